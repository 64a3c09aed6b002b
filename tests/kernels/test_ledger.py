"""What was verified on which GPU, and what the documentation says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tools.kernel_lab import __main__ as script
from tools.kernel_lab import ledger, table

PAGE = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"
H200 = {"gpu": "H200", "driver": "580", "compiler": "nvrtc 13.0", "torch": "2.13", "multiprocessors": 132}
FINE: dict[str, Any] = {"error": 0.1, "limit": 0.2}
TIMED: dict[str, Any] = {
    "us": 20.0, "floor_us": 10.0, "of_floor": 0.5, "target": "0.4 / 0.8 of floor", "reached": "first", "spread": 0.01,
    "peers": {"slow": {"us": 50.0, "times_faster": 2.5}, "fast": {"us": 30.0, "times_faster": 1.5},
              "the gather alone": {"us": 2.0, "times_faster": 0.1}, "absent": {"failure": "?"}},
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a ledger of its own."""
    monkeypatch.setattr(ledger, "PATH", tmp_path / "VERIFIED.json")
    return ledger.PATH


def test_the_ledger_knows_what_was_verified(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source is verified when all its checks passed, and until its text changes."""
    assert ledger.unverified() == ledger.sources() and "norm.cu" in ledger.sources()
    results = {
        "norm.cu": {"a": FINE, "b": {"error": 0.15, "limit": 0.2}, "c": {"equal": True}},
        "act.cu": {"a": FINE, "b": {"failure": "?"}},
        "moe.cu": {"a": {"skipped": "?"}},
    }
    ledger.record_checks({**H200, "sanitizer": {"memcheck": {"skipped": "not done within 60 s"}}}, results)
    assert set(ledger.sources()) - set(ledger.unverified()) == {"norm.cu"}
    entry = ledger.read()["norm.cu"]
    assert (entry["gpu"], entry["driver"], entry["checks"]) == ("H200", "580", 3)
    assert entry["worst"] == {"check": "b", "error": 0.15} and "multiprocessors" not in entry
    assert entry["sanitizer"] == {"memcheck": {"skipped": "not done within 60 s"}}  # verified, but not by it
    assert ledger.read()["act.cu"]["open"] == {"b": "?"}
    monkeypatch.setattr(ledger, "source_hash", lambda source: "another")
    assert "norm.cu" in ledger.unverified()


def test_specialisations_are_verified_one_by_one(path: Path) -> None:
    """What only passed checks launched is verified; a later failure takes that back, a check left out does not."""

    def record(**checks: dict[str, Any]) -> list[str]:
        ledger.record_checks(H200, {"gemv.cu": checks})
        return ledger.read()["gemv.cu"]["specialisations"]

    one, both = {**FINE, "kernels": ["gemv M=1"]}, {**FINE, "kernels": ["gemv M=1", "gemv M=2"]}
    assert record(a=both, b={"failure": "?", "kernels": ["gemv M=2", "gemv M=4"]}) == ["gemv M=1"]
    assert "gemv.cu" in ledger.unverified()
    assert record(a=both, b={"skipped": "out of time"}) == ["gemv M=1", "gemv M=2"] and "gemv.cu" in ledger.unverified()
    assert record(a=one) == ["gemv M=1", "gemv M=2"] and "gemv.cu" not in ledger.unverified()


def test_times_belong_to_verified_sources(path: Path) -> None:
    """Times are kept of what this GPU verified, with the fastest peer that did the whole work; the rest is dropped."""
    ledger.record_checks(H200, {"norm.cu": {"a": FINE}})
    benches = {"norm.cu": {"a": TIMED, "b": {"failure": "?"}}, "act.cu": {"a": TIMED}}
    ledger.record_times({**H200, "gpu": "another"}, benches, {})
    assert ledger.read()["norm.cu"]["times"] == {}
    ledger.record_times(H200, benches, {"step": TIMED, "other": {"skipped": "?"}})
    entries = ledger.read()
    assert set(entries) == {"norm.cu", "engine"} and set(entries["engine"]["times"]) == {"step"}
    ledger.record_checks(H200, {"norm.cu": {"a": FINE}})
    assert ledger.read()["norm.cu"]["times"] == entries["norm.cu"]["times"]  # checked again, it is no slower
    (found,) = entries["norm.cu"]["times"].values()
    assert (found["us"], found["peer"], found["times_faster"]) == (20.0, "fast", 1.5) and "peers" not in found


def test_the_table_is_made_of_the_ledger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of what is verified as it is now; what changed since, or never ran, is named and has no row."""
    assert "Nothing has been measured on a GPU" in table.measured()
    ledger.record_checks(H200, {"norm.cu": {"a": FINE}, "act.cu": {"a": FINE}})
    ledger.record_times(H200, {"norm.cu": {"add": TIMED}, "act.cu": {"silu": TIMED}}, {"B=1": TIMED})
    text = table.measured()
    assert "| norm.cu | add | 20.0 | 50% | 0.4 / 0.8 of floor | first | fast | 1.50 |" in text
    assert "| engine | B=1 |" in text and "Measured on H200, driver 580, nvrtc 13.0" in text
    entries = json.loads(path.read_text())
    entries["act.cu"]["sha256"] = "of an older text"
    path.write_text(json.dumps(entries))
    assert "| act.cu |" not in table.measured() and "`act.cu`" in table.measured()


def test_the_page_holds_the_table() -> None:
    """Between its marks stands what `python -m tools.kernel_lab table --write docs/benchmarks.md` puts there."""
    assert table.put(table.measured(), PAGE, "kernels") == PAGE


def test_the_commands_print_ledger_and_table(path: Path, tmp_path: Path) -> None:
    """`ledger` names what is not verified, and never fails; `table` prints, or writes between the marks."""
    runner = CliRunner()
    told = runner.invoke(script.main, ["ledger"])
    assert (
        told.exit_code == 0
        and told.output == f"not verified on any GPU in their current version: {', '.join(ledger.sources())}\n"
    )
    document = tmp_path / "benchmarks.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    printed = runner.invoke(script.main, ["table"]).output
    assert runner.invoke(script.main, ["table", "--write", str(document)]).exit_code == 0
    assert document.read_text() == f"before\n{BEGIN}\n{printed}{END}\nafter\n"


def test_a_run_ends_with_forty_lines_at_most() -> None:
    """One line per measurement, cut at forty; what failed or was skipped has its line."""
    kernels = {"a.cu": {f"bench {i}": TIMED for i in range(60)}}
    lines = list(table.times(kernels, {}))
    assert len(lines) == 40 and lines[1].split() == "a.cu bench 0 20.0 50% 0.4 / 0.8 of floor first fast 1.50".split()
    lost = list(table.times({"a.cu": {"x": {"failure": "?"}}}, {"y": {"skipped": "?"}}))
    assert "failed" in lost[1] and "skipped" in lost[2]
