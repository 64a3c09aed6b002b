"""The tests of the core are tested too: a few seeded faults, all of which must be noticed."""

from __future__ import annotations

import pytest

from tests.core.mutants import MUTANTS, ROOT, survives

SAMPLE = ["preempt the head", "window off by one, short", "key without the parent"]


@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if mutant[0] in SAMPLE], ids=lambda mutant: mutant[0])
def test_a_seeded_fault_is_noticed(mutant: tuple[str, str, str, str]) -> None:
    """A core broken in this way does not pass the quick tests; tests/core/mutants.py runs all of them."""
    assert not survives(*mutant)


def test_a_core_without_a_fault_passes() -> None:
    """Else every fault would count as noticed: a module that is missing fails the quick tests, too."""
    assert survives("none", "scheduler", "class Scheduler:", "class Scheduler: ")


def test_every_mutant_still_applies() -> None:
    """Each mutant's text occurs once in its file, and no two have the same name."""
    names = [name for name, _, _, _ in MUTANTS]
    assert len(set(names)) == len(names) >= 60
    for name, file, old, new in MUTANTS:
        source = (ROOT / "trio_llm" / "core" / f"{file}.py").read_text()
        assert source.count(old) == 1, name
        compile(source.replace(old, new), file, "exec")
