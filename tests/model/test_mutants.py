from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.model.golden import FP32_TOLERANCE, Golden
from tests.model.mutants import MUTANTS


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_fails_a_golden_comparison(name: str, golden: Callable[[str], Golden]) -> None:
    """Each known way of getting a model slightly wrong moves its logits beyond the goldens' tolerance."""
    mutant = MUTANTS[name]
    assert mutant.difference(golden(mutant.family)) > 10 * FP32_TOLERANCE
