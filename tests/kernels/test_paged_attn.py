"""Paged attention against float64, over head sizes, groups, dtypes, windows, tiles and splits."""

from __future__ import annotations

import pytest
import torch

from cuda_kernels.paged_attn import HEAD_DIMS, Device, Tile, choose_blocks, choose_tile, supports, widened
from cuda_kernels.tuning import BY_ARCHITECTURE
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
        for head_dim in HEAD_DIMS:
            for int8 in (False, True):
                tile = choose_tile(packed_rows, head_dim, device, int8=int8)
                assert tile.shared_bytes(head_dim, int8=int8) <= device.shared_bytes


def test_long_prefills_have_32_rows_a_warp() -> None:
    """Where two such blocks fit on every multiprocessor, and registers suffice; others keep more warps of 16 rows."""
    h200, ada = Device(132, 227 * 1024), Device(128, 99 * 1024)
    b200 = Device(148, 227 * 1024, BY_ARCHITECTURE[10, 0])
    narrow = choose_tile(4096, 128, h200, int8=False)
    assert widened(narrow, 264, 128, h200, int8=False) == Tile(128, 32, 1, 2, warp_rows=32)
    assert widened(narrow, 264, 64, h200, int8=False) == Tile(128, 64, 1, 2, warp_rows=32)
    assert widened(narrow, 264, 64, h200, int8=True).keys == 32
    assert widened(narrow, 263, 128, h200, int8=False) == widened(narrow, 264, 128, h200, int8=True) == narrow
    assert widened(narrow, 500, 128, ada, int8=False) == widened(narrow, 500, 128, b200, int8=False) == narrow
    assert widened(narrow, 500, 64, ada, int8=False) == widened(narrow, 500, 64, b200, int8=False) != narrow
    small = choose_tile(16, 128, h200, int8=False)
    assert widened(small, 1000, 128, h200, int8=False) == small


def test_blocks_fill_the_device_and_no_more() -> None:
    """Decodes are shared by the blocks that are resident; prefills of many tiles are not."""
    own = BY_ARCHITECTURE[9, 0]
    assert choose_blocks(1, 32, 8, 32768, 396, own) == choose_blocks(1, 256, 8, 2048, 396, own) == 49
    assert choose_blocks(1, 1, 2, 32768, 528, own) == 64  # parts of one context, at most
    assert choose_blocks(1, 1, 8, 300, 396, own) == 2
    assert choose_blocks(1, 1, 500, 300, 396, own) == 1
    assert choose_blocks(16, 1, 2, 8192, 132, own) == 66
    assert choose_blocks(16, 1, 8, 8192, 128, own) == 0


def test_stages_fill_the_shared_memory() -> None:
    """A block has as many tiles in flight as leave room for the others of its multiprocessor."""
    h200 = Device(132, 227 * 1024)
    small, large = (choose_tile(4, head_dim, h200, int8=False) for head_dim in (64, 128))
    assert (small.blocks(64, h200, int8=False), large.blocks(128, h200, int8=False)) == (4, 3)
    assert small.deepened(4, 64, h200, int8=False).stages == 3
    assert [large.deepened(blocks, 128, h200, int8=False).stages for blocks in (3, 2, 1)] == [2, 3, 4]
    assert choose_tile(8, 512, h200, int8=False).deepened(1, 512, h200, int8=False).stages == 3


def test_supports_says_why_not() -> None:
    """What the kernel cannot take is named."""
    q, k = torch.zeros(1, 4, 64, dtype=torch.bfloat16), torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    assert supports(q, k, 16) is None
    assert all(supports(torch.zeros(1, 4, n).half(), torch.zeros(4, 2, n).half(), 16) is None for n in HEAD_DIMS)
    assert supports(q.float(), k, 16) == "dtype torch.float32"
    assert supports(q[..., :48], k, 16) == "head size 48"
    assert supports(q.expand(1, -1, -1).repeat(1, 65, 1), k, 16) == "130 query heads per key head"
    assert supports(q, k, 24) == "block size 24"
