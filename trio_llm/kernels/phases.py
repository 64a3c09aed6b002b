"""A run in phases, each with a deadline, the report on disk after every one."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs


@attrs.define
class Report:
    """What a run has found so far.

    Attributes:
        path: The JSON file, written whole after each phase; None keeps it in memory.
        budget_s: For all phases together; one that would begin after it is skipped.
        clock: Seconds, monotonic.
    """

    path: Path | None
    budget_s: float
    clock: Callable[[], float] = time.monotonic
    phases: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    _began: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._began = self.clock()

    def run(self, name: str, items: Iterable[tuple[str, Callable[[], Any]]], limit_s: float) -> dict[str, Any]:
        """Run the named items of a phase until its deadline; an item that raises is recorded, and the rest goes on.

        Returns:
            Item name -> its result, {"failure": ...} or {"skipped": ...}.
        """
        start = self.clock()
        deadline = min(start + limit_s, self._began + self.budget_s)
        results: dict[str, Any] = {}
        for item, action in items:
            if self.clock() >= deadline:
                results[item] = {"skipped": "out of time"}
                continue
            try:
                results[item] = action()
            except Exception as error:  # noqa: BLE001 - one kernel's failure must not hide the others' results
                results[item] = {"failure": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=4)}
        self.phases[name] = {"seconds": round(self.clock() - start, 3), "results": results}
        self.flush()
        return results

    def flush(self) -> None:
        """Write everything so far."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".part")
            temporary.write_text(json.dumps(self.phases, indent=1, default=str))
            temporary.replace(self.path)

    @property
    def failed(self) -> list[str]:
        """Items that raised, as phase/item."""
        return [
            f"{phase}/{item}"
            for phase, found in self.phases.items()
            for item, result in found["results"].items()
            if isinstance(result, dict) and "failure" in result
        ]
