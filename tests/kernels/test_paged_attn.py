"""Paged attention against float64, over head sizes, groups, dtypes, windows, tiles and splits."""

from __future__ import annotations

import pytest
import torch

from cuda_kernels.paged_attn import Device, Tile, choose_splits, choose_tile, supports
from tests.kernels.helpers import assert_close, simulate
from tools.kernel_lab.attention import CASES, MATRIX, Case, make


@pytest.mark.parametrize("case", CASES, ids=str)
def test_paged_attention(case: Case) -> None:
    """Every way of attending gives the float64 answer, whatever warp runs first, and reads no slot it may not."""
    problem = make(case)
    (out,) = simulate(lambda: (problem.run(),))
    # Products with int8 values are of scaled bfloat16 probabilities, whatever q is: each is off by up to 2^-9.
    assert_close(out, problem.expect(), slack=4, of_largest=2**-8 if case.int8 else 0)


@pytest.mark.kernels_full
@pytest.mark.parametrize("case", MATRIX, ids=str)
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
