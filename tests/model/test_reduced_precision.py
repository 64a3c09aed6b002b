"""bfloat16, INT8 and FP8 keys and values, INT8 weights: bounds against the float32 oracle, and the bytes they save.

The bounds are about twice what was measured on these checkpoints. Sparse models are held to a KL only: where two
experts are nearly equal, rounding picks the other one, and a random tiny model answers quite differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.families import FAMILIES
from tests.model.golden import CHUNKS, Golden, paged_logits
from tests.model.paged import CPU, Paged, load
from trio_llm.model.paged.kv_cache import KVCache

SPARSE = ("qwen3-moe", "mixtral", "gemma4-26b")
MODES: dict[str, tuple[dict[str, Any], float, float, float]] = {
    # settings; dense: RMS of the error / RMS of the logits, mean KL; sparse: mean KL
    "bfloat16": ({"dtype": "bfloat16"}, 0.06, 0.002, 0.03),
    "int8-kv": ({"kv_quantization": True}, 0.03, 0.001, 0.05),
    "int8-kv-bfloat16": ({"kv_quantization": True, "dtype": "bfloat16"}, 0.06, 0.002, 0.06),
    "fp8-kv": ({"kv_cache_dtype": "fp8"}, 0.16, 0.008, 0.06),
    "int8-weights": ({"quantization": "int8"}, 0.10, 0.003, 0.06),
    "int8-weights-bfloat16": ({"quantization": "int8", "dtype": "bfloat16"}, 0.12, 0.004, 0.06),
}


def errors(reference: Tensor, got: Tensor) -> tuple[float, float]:
    """Return the RMS error relative to the logits' RMS, and the mean KL divergence in nats."""
    p, q = reference.log_softmax(-1), got.log_softmax(-1)
    rms = (got - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt()
    return float(rms), float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_errors_stay_in_bounds(name: str, mode: str, golden: Callable[[str], Golden]) -> None:
    """In each reduced precision, logits stay within the bounds stated above."""
    settings, dense_rms, dense_kl, sparse_kl = MODES[mode]
    case = golden(name)
    rms, kl = errors(torch.cat(case.logits), paged_logits(load(case.directory, **settings), case, 16))
    if name in SPARSE:
        assert kl < sparse_kl
    else:
        assert (rms < dense_rms, kl < dense_kl) == (True, True), (rms, kl)


def stored_int8(case: Golden, chunk: int | None) -> dict[int, tuple[Tensor, Tensor]]:
    """Prefill the longest prompt; return per owning layer its int8 keys and values in token order."""
    loaded = load(case.directory, kv_quantization=True)
    paged = Paged(loaded, 1)
    paged.prefill([case.prompts[0]], chunk)
    stored = {}
    for index, layer in enumerate(paged.kv.layers):
        group = paged.layout.groups[layer.group]
        positions = torch.arange(max(0, len(case.prompts[0]) - (group.window or 1000)), len(case.prompts[0]))
        blocks = torch.tensor(paged.tables[0][layer.group])[positions // group.block_size]
        slots = blocks * group.block_size + positions % group.block_size
        stored[index] = (layer.k[slots], layer.v[slots])
    return stored


@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "mixtral", "gemma4-e2b", "gemma4-31b"])
def test_stored_int8_does_not_depend_on_chunks(name: str, golden: Callable[[str], Golden]) -> None:
    """The same int8 keys and values are stored however the prompt was cut.

    Attention reads back what was stored even for the chunk's own tokens; were it to read unquantised ones, deeper
    layers would differ by several units. What remains is float noise at a rounding edge: one unit, in under 0.2 %.
    """
    case = golden(name)
    whole = stored_int8(case, None)
    for chunk in CHUNKS[1:]:
        for layer, parts in stored_int8(case, chunk).items():
            for got, expected in zip(parts, whole[layer], strict=True):
                difference = (got.int() - expected.int()).abs()
                assert difference.max() <= 1
                assert difference.count_nonzero() < 0.002 * difference.numel()


@pytest.mark.parametrize(("head_dim", "most"), [(64, 0.54), (128, 0.52)])
def test_int8_kv_takes_half_the_bytes_of_bfloat16(head_dim: int, most: float) -> None:
    """What is allocated for INT8 KV, scales included, is about half of bfloat16's: (D + 4) / 2D."""
    from tests.model.test_kv_cache import uniform

    sizes = [KVCache(uniform(8, head_dim, dtype=d), 64, CPU).nbytes for d in (torch.int8, torch.bfloat16)]
    assert 0.5 < sizes[0] / sizes[1] < most


@pytest.mark.parametrize("name", ["qwen2", "llama", "mixtral", "gemma4-e2b"])
def test_int8_weights_take_a_quarter_of_float32(name: str, golden: Callable[[str], Golden]) -> None:
    """Quantised weights shrink in memory; what stays is scales, norms and routers."""
    case = golden(name)
    dense, quantised = (load(case.directory, quantization=q).plan.weight_bytes for q in (None, "int8"))
    assert quantised < 0.33 * dense
