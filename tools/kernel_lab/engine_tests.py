"""The engine's tests as items: each test's outcome is a record, said as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cuda_kernels.compile import SOURCES


def run(paths: Sequence[str], seconds: float, say: Callable[[dict[str, Any]], None]) -> dict[str, dict[str, int]]:
    """Run the tests that need a GPU, in this process; those that would begin after `seconds` are left out.

    Returns:
        How many there were of each outcome, as one value: a key "failure" would make an item of them that failed.
    """
    reporter = _Reporter(time.monotonic() + seconds, say)
    # Warnings are errors where the versions of packages are ours to choose; here they are what they are.
    options = ["-m", "gpu", "-n", "0", "-q", "-p", "no:cacheprovider", "-W", "default", f"--rootdir={SOURCES.parent}"]
    code = pytest.main([*options, *paths], plugins=[reporter])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code}: see the log")
    return {"outcomes": reporter.outcomes}


class _Reporter:
    def __init__(self, deadline: float, say: Callable[[dict[str, Any]], None]) -> None:
        self._deadline, self._say = deadline, say
        self._found: dict[str, Any] = {}
        self.outcomes: dict[str, int] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say({"begin": nodeid})
        self._found = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if time.monotonic() >= self._deadline:
            pytest.skip("out of time")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._found = {"failure": f"{report.when}: {report.longreprtext[-1500:]}"}
        elif report.skipped:
            self._found = {"skipped": str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else "")}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._say({"item": nodeid, "result": self._found or {"passed": True}})
        outcome = next(iter(self._found), "passed")
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
