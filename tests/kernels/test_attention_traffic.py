"""The lint of attention: sectors at the floor, no bank conflicts, few instructions per token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cuda_kernels.paged_attn import Tile
from tests.kernels.compilers import most
from tests.kernels.helpers import count
from tools.kernel_lab.attention import Case, make
from tools.ptx_simulator.counters import Counters

# case, most warp instructions per cached token and key head (measured, plus a tenth)
DECODES = [
    (Case(kv_heads=1, sequences=((1, 512),), blocks=0), 34),
    (Case(kv_heads=1, sequences=((1, 512),), blocks=0, int8=True), 70),
    (Case(kv_heads=1, sequences=((1, 512),), blocks=0, int8=True, fp8=True), 82),
    (Case(kv_heads=1, head_dim=64, group=7, sequences=((1, 512),), blocks=0), 24),
    (Case(kv_heads=1, head_dim=512, group=8, sequences=((1, 128),), blocks=0), 190),
]


@pytest.mark.parametrize(("case", "most_instructions"), DECODES, ids=str)
def test_decode_reads_the_cache_once(case: Case, most_instructions: int) -> None:
    """Keys, values and scales move once, in full sectors; ldmatrix never conflicts; instructions stay few."""
    counted = count(make(case).run)
    tokens = case.sequences[0][1]
    bytes_a_token = 2 * (case.head_dim * (1 if case.int8 else 2) + (4 if case.int8 else 0))
    assert counted.sectors["cp"] * 32 == tokens * bytes_a_token
    q_bytes = case.group * case.head_dim * 2
    tables = counted.sectors["ld"] * 32 - q_bytes
    assert tables < 0.05 * tokens * bytes_a_token
    assert counted.sectors["st"] * 32 == q_bytes
    for opcode in ("ldmatrix", "ld"):
        assert counted.passes[opcode] == counted.passes_least[opcode]
    assert counted.issued.total() / tokens < most(most_instructions)


@pytest.mark.parametrize(("head_dim", "int8", "most_instructions"), [(80, False, 41), (96, True, 75)])
def test_a_padded_head_moves_no_more(head_dim: int, int8: bool, most_instructions: int) -> None:
    """Head sizes 80 and 96 are 128 in shared memory alone: what fills them up is neither read nor written."""
    case = Case(kv_heads=1, head_dim=head_dim, sequences=((1, 512),), blocks=0, int8=int8)
    counted = count(make(case).run)
    assert counted.sectors["cp"] * 32 == case.cache_bytes
    assert counted.sectors["st"] * 32 == case.group * head_dim * 2
    assert counted.passes["ldmatrix"] == counted.passes_least["ldmatrix"]
    assert counted.issued.total() / 512 < most_instructions  # measured, plus a tenth


# Head size, 8-bit cache, and most fragments read per product with 16 and 32 rows a warp: measured, plus a twentieth.
@pytest.mark.parametrize(
    ("head_dim", "int8", "narrow", "wide"),
    [(64, False, 0.59, 0.33), (128, False, 0.59, 0.394), (64, True, 0.33, 0.263)],
)
def test_32_rows_a_warp_read_half_as_much(head_dim: int, int8: bool, narrow: float, wide: float) -> None:
    """A fragment of keys that is read from shared memory serves all rows of its warp; so does widening 8-bit ones."""
    keys = 64 if head_dim == 64 and not int8 else 32
    case = Case(head_dim=head_dim, kv_heads=1, group=1, int8=int8, sequences=((128, 256),), blocks=0)
    tiles = Tile(128, 64, 1, 2), Tile(128, keys, 1, 2, warp_rows=32)
    of_16, of_32 = (count(make(replace(case, tile=tile)).run) for tile in tiles)
    for counted, bound in ((of_16, narrow), (of_32, wide)):
        assert counted.issued["ldmatrix"] / counted.issued["mma"] < bound
        assert counted.passes["ldmatrix"] == counted.passes_least["ldmatrix"]
    assert of_32.issued["mma"] == of_16.issued["mma"] and of_32.issued.total() < of_16.issued.total()


def test_a_long_context_is_not_one_blocks_work() -> None:
    """One context of 32 tiles among seven of one tile: the busiest block executes less than half."""
    case = Case(head_dim=64, kv_heads=1, group=7, sequences=((1, 64),) * 3 + ((1, 2048),) + ((1, 64),) * 4)
    alone, shared = (count(make(replace(case, blocks=blocks)).run).by_block.values() for blocks in (0, 8))
    assert len(alone) == len(shared) == 8
    assert max(alone) > 5 * sum(alone) / 8
    assert max(shared) < min(0.45 * max(alone), 1.7 * sum(shared) / 8)


def test_counters_see_conflicts_and_waste() -> None:
    """A stride of 32 words conflicts in every bank; 16 bytes at a stride of 64 waste half a sector."""
    counters = Counters()
    lanes = np.arange(32)
    counters.shared_access("ld", lanes // 32, lanes * 128, 4)
    counters.global_access("ld", lanes // 32, lanes * 64, 16)
    assert (counters.passes["ld"], counters.passes_least["ld"]) == (32, 1)
    assert (counters.sectors["ld"], counters.sectors_least["ld"]) == (32, 16)
