"""The lint of attention: sectors at the floor, no bank conflicts, few instructions per token."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.helpers import count
from tools.kernel_lab.attention import Case, make
from tools.ptx_simulator.counters import Counters

# case, most warp instructions per cached token and key head (measured, plus a tenth)
DECODES = [
    (Case(kv_heads=1, sequences=((1, 512),), splits=1), 42),
    (Case(kv_heads=1, sequences=((1, 512),), splits=1, int8=True), 70),
    (Case(kv_heads=1, sequences=((1, 512),), splits=1, int8=True, fp8=True), 82),
    (Case(kv_heads=1, head_dim=64, group=7, sequences=((1, 512),), splits=1), 32),
    (Case(kv_heads=1, head_dim=512, group=8, sequences=((1, 128),), splits=1), 240),
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
    assert counted.issued.total() / tokens < most_instructions


def test_counters_see_conflicts_and_waste() -> None:
    """A stride of 32 words conflicts in every bank; 16 bytes at a stride of 64 waste half a sector."""
    counters = Counters()
    lanes = np.arange(32)
    counters.shared_access("ld", lanes // 32, lanes * 128, 4)
    counters.global_access("ld", lanes // 32, lanes * 64, 16)
    assert (counters.passes["ld"], counters.passes_least["ld"]) == (32, 1)
    assert (counters.sectors["ld"], counters.sectors_least["ld"]) == (32, 16)
