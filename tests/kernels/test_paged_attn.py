"""Paged attention against float64, over head sizes, groups, dtypes, windows, tiles and splits."""

from __future__ import annotations

import pytest
import torch

from cuda_kernels.paged_attn import Device, Tile, choose_splits, choose_tile, supports
from tests.kernels.attention_cases import Case, make, reference
from tests.kernels.helpers import assert_close, simulate

CASES = [
    Case(),
    Case(sequences=((1, 130), (1, 0), (1, 64), (1, 65)), splits=3),
    Case(head_dim=64, group=7, sequences=((5, 40), (1, 17))),
    Case(kv_heads=1, group=1, sequences=((40, 40), (3, 90)), softcap=5.0),
    Case(head_dim=256, group=2, kv_heads=1, sequences=((1, 70),), window=33, block_size=32),
    Case(head_dim=512, group=4, kv_heads=1, sequences=((1, 40), (1, 33))),
    Case(int8=True, sequences=((1, 100), (1, 31)), splits=2, padding=128),
    Case(int8=True, head_dim=64, group=7, kv_heads=1, sequences=((12, 80),), window=17),
]
FULL = [
    Case(head_dim=256, group=8, kv_heads=1, sequences=((9, 50),), window=20),
    Case(head_dim=256, group=2, kv_heads=1, sequences=((9, 40),), int8=True),
    Case(head_dim=512, group=8, kv_heads=1, sequences=((5, 37),), padding=64),
    Case(dtype=torch.float16, int8=True, kv_heads=1, sequences=((30, 70),)),
    Case(dtype=torch.float16, head_dim=64, sequences=((1, 50),), splits=2),
] + [
    Case(head_dim=head_dim, group=group, kv_heads=1, int8=int8, window=window, softcap=softcap, splits=splits,
         sequences=sequences, block_size=block_size, dtype=dtype)
    for head_dim, group in ((64, 1), (64, 7), (128, 4), (128, 8), (256, 4), (512, 8))
    for int8 in (False, True)
    for window, softcap, splits in ((None, None, None), (19, None, 2), (None, 30.0, 3))
    for sequences, block_size in ((((1, 1), (1, 15), (1, 16), (1, 17), (1, 0), (1, 193)), 16),
                                  (((5, 5), (40, 77), (1, 33)), 32))
    for dtype in (torch.bfloat16, torch.float16)
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_paged_attention(case: Case) -> None:
    """Every way of attending gives the float64 answer, whatever warp runs first, and reads no slot it may not."""
    problem = make(case)
    (out,) = simulate(lambda: (problem.run(),))
    # Products with int8 values are of scaled bfloat16 probabilities, whatever q is: each is off by up to 2^-9.
    assert_close(out, reference(problem), slack=4, of_largest=2**-8 if case.int8 else 0)


@pytest.mark.kernels_full
@pytest.mark.parametrize("case", FULL, ids=str)
def test_paged_attention_matrix(case: Case) -> None:
    """The same over the whole matrix."""
    test_paged_attention(case)


@pytest.mark.parametrize(("packed_rows", "rows"), [(1, 16), (16, 16), (17, 64), (64, 64), (65, 128), (4096, 128)])
def test_tiles_follow_the_packed_rows(packed_rows: int, rows: int) -> None:
    """Decodes take 16 rows, drafts and short chunks 64, prefills 128; head sizes from 256 on take fewer."""
    h100, ada = Device(132, 227 * 1024), Device(128, 99 * 1024)
    assert choose_tile(packed_rows, 128, h100, int8=False).rows == rows
    assert choose_tile(packed_rows, 256, h100, int8=False).rows == min(rows, 64)
    assert choose_tile(packed_rows, 512, h100, int8=False) == Tile(min(rows, 32), 32, 4, 2)
    for device in (h100, ada):
        for head_dim in (64, 128, 256, 512):
            for int8 in (False, True):
                tile = choose_tile(packed_rows, head_dim, device, int8=int8)
                assert tile.shared_bytes(head_dim, int8=int8) <= device.shared_bytes


def test_splits_fill_the_device_and_no_more() -> None:
    """Few blocks over a long context are split; many blocks, or a short context, are not."""
    h100 = Device(132, 227 * 1024)
    assert choose_splits(8, 32768, h100) == 33
    assert choose_splits(264, 32768, h100) == 1
    assert choose_splits(1, 300, h100) == 1
    assert choose_splits(1, 10**6, h100) == 64


def test_supports_says_why_not() -> None:
    """What the kernel cannot take is named."""
    q, k = torch.zeros(1, 4, 64, dtype=torch.bfloat16), torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    assert supports(q, k, 16) is None
    assert supports(q.float(), k, 16) == "dtype torch.float32"
    assert supports(q[..., :48], k, 16) == "head size 48"
    assert supports(q.expand(1, -1, -1).repeat(1, 65, 1), k, 16) == "130 query heads per key head"
    assert supports(q, k, 24) == "block size 24"
