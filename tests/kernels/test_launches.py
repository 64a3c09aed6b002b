"""The launches of a decode step, counted at a real model's shape: each costs a GPU a microsecond, whatever it does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cuda_kernels import compile as compiling
from tools.kernel_lab.recorded_step import record_step, storages
from tools.kernel_lab.shapes import MODELS

SMALL_MODEL = MODELS["Qwen2.5-0.5B"]
CONTEXT = 32768
GPU_PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_launches_of_a_small_model_at_batch_one() -> None:
    """Qwen2.5-0.5B, one row: what docs/gpu.md says."""
    step = record_step(SMALL_MODEL, 1, CONTEXT)
    layers = {"gemv": 4 * 24, "kv_write": 24, "paged_attention": 24}
    kernels = Counter(launch.kernel.entry for launch in step.launches)
    assert kernels == Counter(layers) + Counter(prepare_step=1, add_rms_norm=1, gemv=1)
    assert Counter(operation.name for operation in step.operations) == {"embedding": 1, "copy_": 1}
    assert len(step.work) == 149 and f"has {len(step.work)} launches" in GPU_PAGE


@pytest.mark.parametrize("source", ["as it is", "x is early too"])
@pytest.mark.parametrize("batch", [1, 8])
def test_nothing_in_a_step_writes_what_is_read_early(batch: int, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph a kernel may read its weights while those before it still write: they write no weights."""
    if source != "as it is":
        expand = compiling.expand
        monkeypatch.setattr(compiling, "expand", lambda name: expand(name).replace("gemv(const", "gemv(EARLY const"))
    step = record_step(SMALL_MODEL, batch, CONTEXT)
    arguments = [pair for one in step.launches for pair in zip(one.kernel.parameters, one.args, strict=True)]
    early = storages([arg for parameter, arg in arguments if parameter.early])
    written = storages([arg for parameter, arg in arguments if not parameter.read_only])
    written |= storages([operation.made for operation in step.operations])
    assert early and written and early.isdisjoint(written) == (source == "as it is")
