"""What the flags for INT8 do to the model that runs, not only to a setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from click.testing import CliRunner

from trio_llm.cli.commands import cli
from trio_llm.demo import demo_model_path
from trio_llm.model import load
from trio_llm.model.ops import Dense, Int8


@pytest.mark.parametrize(
    ("flags", "stored", "matrix"),
    [
        ([], torch.bfloat16, Dense),
        (["--kv-cache-dtype", "int8"], torch.int8, Dense),
        (["--kv-quantization"], torch.int8, Dense),
        (["--quantization", "int8"], torch.bfloat16, Int8),
    ],
)
def test_flags_reach_the_pool_and_the_weights(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], stored: torch.dtype, matrix: type
) -> None:
    """Either spelling of the flag makes the pool's tensors int8, --quantization the weights', and answers come."""
    made: list[tuple[torch.dtype, type]] = []

    def runner(model: Any, *args: Any, **options: Any) -> load.Runner:
        made_runner = real(model, *args, **options)
        made.append((made_runner._kv.layers[0].k.dtype, type(model.layers[0].attention.qkv)))
        return made_runner

    real = load.Runner
    monkeypatch.setattr(load, "Runner", runner)
    words = ["generate", "hello", "--model", str(demo_model_path()), "--kv-blocks", "64", "--max-tokens", "4"]
    answer = CliRunner().invoke(cli, [*words, "--dtype", "bfloat16", *flags])
    assert (answer.exit_code, made) == (0, [(stored, matrix)]), answer.output
    assert answer.output.strip()
