"""The write of keys and values: norms, rotation, paging and quantisation in one launch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cuda_kernels import kv_write
from tests.kernels.helpers import assert_close, count, simulate

EPS = 1e-6


class Case(NamedTuple):
    """One configuration; padding is what separates the slots beyond their heads."""

    head_dim: int
    num_heads: int
    kv_heads: int
    dtype: torch.dtype = torch.bfloat16
    int8: bool = False
    fp8: bool = False  # with int8: e4m3 instead
    qk_norm: bool = False
    v_norm: bool = False
    values: bool = True  # False: values are the raw keys
    padding: int = 0


CASES = [
    Case(64, 14, 2),
    Case(128, 8, 2, qk_norm=True),
    Case(128, 3, 3, dtype=torch.float16, padding=64),
    Case(256, 4, 1, int8=True, v_norm=True, qk_norm=True),
    Case(512, 4, 2, values=False, v_norm=True, qk_norm=True),
    Case(64, 2, 1, int8=True, dtype=torch.float16),
    Case(80, 3, 1, qk_norm=True, v_norm=True),
    Case(96, 2, 2, int8=True, qk_norm=True, padding=32),
    Case(80, 2, 1, int8=True, fp8=True, dtype=torch.float16),
    Case(128, 4, 4, int8=True, padding=128),
    Case(512, 2, 1, int8=True),
    Case(64, 2, 1, int8=True, fp8=True, dtype=torch.float16),
    Case(128, 4, 4, int8=True, fp8=True, v_norm=True, qk_norm=True, padding=128),
]
FP8 = torch.float8_e4m3fn
SLOTS = torch.tensor([3, 17, -1, 0, 9])
NUM_SLOTS = 20


def make(case: Case) -> tuple[Tensor, ...]:
    """Return qkv, cos, sin and the norm's weights."""
    torch.manual_seed(case.head_dim + case.num_heads)
    heads = case.num_heads + (2 if case.values else 1) * case.kv_heads
    qkv = torch.randn(len(SLOTS), heads * case.head_dim).to(case.dtype)
    angles = torch.randn(len(SLOTS), case.head_dim // 2) * 9
    angles[:, case.head_dim // 8 :] = 0  # as in a proportional rotation: the rest stays
    return qkv, angles.cos(), angles.sin(), torch.rand(case.num_heads + case.kv_heads, case.head_dim) + 0.5


def caches(case: Case) -> list[Tensor]:
    """Return keys and values, each slot poisoned."""
    stride = case.kv_heads * case.head_dim + case.padding
    dtype = FP8 if case.fp8 else torch.int8 if case.int8 else case.dtype
    flat = [torch.full((NUM_SLOTS * stride,), 77 if case.int8 else torch.nan).to(dtype) for _ in range(2)]
    return [x.as_strided((NUM_SLOTS, case.kv_heads, case.head_dim), (stride, case.head_dim, 1)) for x in flat]


def reference(case: Case, qkv: Tensor, cos: Tensor, sin: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in float64."""
    heads = qkv.double().view(len(qkv), -1, case.head_dim)

    def normalise(x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()

    qk, v = heads[:, : case.num_heads + case.kv_heads], heads[:, -case.kv_heads :]
    if case.qk_norm:
        qk = normalise(qk) * weights.double()
    first, second = qk.chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    qk = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    return qk[:, : case.num_heads], qk[:, case.num_heads :], normalise(v) if case.v_norm else v


@pytest.mark.parametrize("case", CASES, ids=str)
def test_write_kv(case: Case) -> None:
    """q, k and v are as in float64, in their slots and nowhere else; a slot of -1 is skipped."""
    qkv, cos, sin, weights = make(case)

    def run() -> tuple[Tensor, ...]:
        k, v = caches(case)
        scales = [torch.full((NUM_SLOTS, case.kv_heads), torch.nan) if case.int8 else None for _ in range(2)]
        q = kv_write.write_kv(
            qkv, cos, sin, SLOTS, k, v, *scales,
            num_heads=case.num_heads, qk_norm=weights if case.qk_norm else None, v_norm=case.v_norm, eps=EPS,
        )  # fmt: skip
        return q, k.contiguous(), v.contiguous(), *(s for s in scales if s is not None)

    q, k, v, *scales = simulate(run)
    expected_q, *expected = reference(case, qkv, cos, sin, weights)
    assert_close(q, expected_q)
    written = SLOTS >= 0
    for i, (cache, every) in enumerate(zip((k, v), expected, strict=True)):
        untouched = torch.ones(NUM_SLOTS, dtype=torch.bool)
        untouched[SLOTS[written]] = False
        wanted = every[written]
        if case.int8:
            assert (cache.float()[untouched] == caches(case)[0][0, 0, 0].float()).all() and scales[i][
                untouched
            ].isnan().all()
            scale = scales[i][SLOTS[written]].double()
            torch.testing.assert_close(scale, wanted.abs().amax(-1) / (448 if case.fp8 else 127), rtol=1e-5, atol=0)
            if case.fp8:
                got = cache.double()[SLOTS[written]] * scale[..., None]
                torch.testing.assert_close(got, wanted, rtol=2**-4 + 1e-3, atol=float(scale.max()) * 2**-9)
                continue
            assert ((cache[SLOTS[written]].double() - wanted / scale[..., None]).abs() <= 0.5 + 1e-3).all()
        else:
            assert cache[untouched].isnan().all()
            assert_close(cache[SLOTS[written]], wanted)


def assert_rounded_as_torch() -> None:
    """Write values of a scale of 1, read as whole rows: every e4m3 number, those between, and what is next to these."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    edges = torch.cat((numbers, between, between * (1 + 2**-7), between * (1 - 2**-7))).bfloat16()
    values = torch.cat((edges, edges.new_zeros(-len(edges) % 63))).view(-1, 63)
    values = torch.cat((torch.full((len(values), 1), 448.0), values), dim=1).bfloat16()
    values = values.where(values.abs() <= 448, 0.0)
    angles, slots = torch.zeros(len(values), 32), torch.arange(len(values))

    def run() -> tuple[Tensor, ...]:
        k, v = torch.zeros(2, len(values), 1, 64, dtype=torch.uint8).view(FP8)
        scales = torch.zeros(2, len(values), 1)
        args = (torch.cat((values, values, values), dim=1), angles.cos(), angles.sin(), slots, k, v, *scales)
        kv_write.write_kv(*args, num_heads=1, qk_norm=None, v_norm=False, eps=EPS)
        return k[:, 0].view(torch.uint8), v[:, 0].view(torch.uint8), scales

    k, v, scales = simulate(run, orders=(0,))
    assert (scales == 1).all()
    assert torch.equal(k.view(FP8).float(), values.float().to(FP8).float()) and torch.equal(k, v)


def test_fp8_is_rounded_as_torch_rounds_it() -> None:
    """To nearest, ties to even, subnormal numbers too."""
    assert_rounded_as_torch()


def test_zeros_are_quantised_to_zeros() -> None:
    """A head of zeros has the least scale instead of dividing by nothing."""
    case = Case(64, 1, 1, int8=True)
    k, v = caches(case)
    scales = torch.zeros(2, NUM_SLOTS, 1)
    qkv, cos = torch.zeros(1, 192, dtype=torch.bfloat16), torch.ones(1, 32)
    args = (qkv, cos, cos, SLOTS[:1], k, v, *scales)
    simulate(lambda: (kv_write.write_kv(*args, num_heads=1, qk_norm=None, v_norm=False, eps=EPS),))
    assert (k[3] == 0).all() and (v[3] == 0).all() and (scales[:, 3] == torch.finfo(torch.float32).tiny).all()


def test_a_layer_that_reads_anothers_cache_only_rotates() -> None:
    """Of query heads alone, q comes out and nothing is written."""
    case = Case(64, 3, 1)
    qkv, cos, sin, _ = make(case)
    k, v = caches(case)
    args = (qkv[:, : 3 * 64], cos, sin, SLOTS, k, v, None, None)
    (q,) = simulate(lambda: (kv_write.write_kv(*args, num_heads=3, qk_norm=None, v_norm=False, eps=EPS),))
    assert_close(q, reference(case, *make(case))[0])
    assert k.isnan().all() and v.isnan().all()


def test_traffic_is_coalesced() -> None:
    """Every access of a warp fills the sectors it touches."""
    case = Case(128, 8, 2, qk_norm=True)
    qkv, cos, sin, weights = make(case)
    k, v = caches(case)
    args = (qkv, cos, sin, SLOTS, k, v, None, None)
    counted = count(lambda: kv_write.write_kv(*args, num_heads=8, qk_norm=weights, v_norm=False, eps=EPS))
    assert counted.sectors == counted.sectors_least


def test_supports_says_why_not() -> None:
    """A dtype, head size or slot that the kernel cannot take is named."""
    qkv, k = torch.zeros(1, 192, dtype=torch.bfloat16), torch.zeros(4, 1, 64, dtype=torch.bfloat16)
    assert kv_write.supports(qkv, k) is None
    assert kv_write.supports(qkv.float(), k) == "dtype torch.float32"
    assert kv_write.supports(qkv, k[..., :32]) == "head size 32"
    assert kv_write.supports(qkv, torch.zeros(5, 1, 68, dtype=torch.bfloat16)[..., :64]) == "slots of 136 bytes"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_nan_stays_nan(dtype: torch.dtype) -> None:
    """A head with a NaN has NaN for its scale, so that its row fails; another token's heads have theirs."""
    qkv, angles = torch.randn(2, 3 * 64).bfloat16(), torch.zeros(2, 32)
    qkv[0, 64 + 5] = qkv[0, 128 + 40] = torch.nan

    def run() -> tuple[Tensor, ...]:
        caches, scales = torch.zeros(2, 2, 1, 64).to(dtype), torch.zeros(2, 2, 1)
        args = (qkv, angles.cos(), angles.sin(), torch.arange(2), *caches, *scales)
        kv_write.write_kv(*args, num_heads=1, qk_norm=None, v_norm=False, eps=1e-6)
        return (scales,)

    (scales,) = simulate(run)
    assert scales[:, 0].isnan().all() and scales[:, 1].isfinite().all()
