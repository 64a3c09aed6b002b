"""What the flags for INT8 do to the model that runs, not only to a setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from click.testing import CliRunner

from trio_llm.cli.commands import cli
from trio_llm.demo import demo_model_path
from trio_llm.model import load
from trio_llm.model.ops.matrices import Panels


@pytest.mark.parametrize(
    ("flags", "stored", "weights"),
    [
        ([], torch.bfloat16, torch.bfloat16),
        (["--kv-cache-dtype", "int8"], torch.int8, torch.bfloat16),
        (["--kv-cache-dtype", "fp8"], torch.float8_e4m3fn, torch.bfloat16),
        (["--kv-quantization"], torch.int8, torch.bfloat16),
        (["--quantization", "int8"], torch.bfloat16, torch.int8),
    ],
)
def test_flags_reach_the_pool_and_the_weights(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], stored: torch.dtype, weights: torch.dtype
) -> None:
    """Flags make the pool's tensors int8 or FP8, --quantization makes the weights int8, and answers come."""
    made: list[tuple[torch.dtype, torch.dtype]] = []

    def runner(model: Any, *args: Any, **options: Any) -> load.Runner:
        made_runner = real(model, *args, **options)
        qkv = model.layers[0].attention.qkv
        made.append((made_runner._kv.layers[0].k.dtype, qkv.kind if isinstance(qkv, Panels) else qkv.weight.dtype))
        return made_runner

    real = load.Runner
    monkeypatch.setattr(load, "Runner", runner)
    words = ["generate", "hello", "--model", str(demo_model_path()), "--kv-blocks", "64", "--max-tokens", "4"]
    answer = CliRunner().invoke(cli, [*words, "--dtype", "bfloat16", *flags])
    assert (answer.exit_code, made) == (0, [(stored, weights)]), answer.output
    assert answer.output.strip()
