"""The script that checks and measures kernels, run on the simulator, and the ledger it keeps."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from trio_llm.kernels import __main__ as script
from trio_llm.kernels import cases, ledger
from trio_llm.kernels.cases import Check
from trio_llm.kernels.phases import Report


def invoke(*args: str) -> Result:
    """Run the command line."""
    return CliRunner().invoke(script.main, args)


@pytest.mark.kernels_full
def test_every_check_passes_simulated(tmp_path: Path) -> None:
    """`check --sim` compares every kernel, twice, and writes what it found."""
    done = invoke("check", "--sim", "--out", str(tmp_path / "out" / "check.json"))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert list(found) == ["environment", "correctness", "repeatability"]
    assert {item.split(":")[0] for item in found["correctness"]["results"]} == set(ledger.sources())
    assert all(result["error"] <= result["limit"] for result in found["correctness"]["results"].values())


def test_check_runs_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the first few checks; nothing simulated is called verified."""
    monkeypatch.setattr(script, "all_checks", lambda device, scale: islice(cases.all_checks(device, scale=scale), 5))
    monkeypatch.setattr(ledger, "PATH", tmp_path / "VERIFIED.json")
    done = invoke("check", "--sim")
    assert done.exit_code == 0, done.output
    assert "norm.cu: rms_norm torch.bfloat16: {'equal': True}" in done.output
    assert "not verified on any GPU as they are now: " in done.output and not ledger.PATH.exists()


def test_bench_runs_simulated(tmp_path: Path) -> None:
    """`bench --sim` runs every kernel and every peer once."""
    done = invoke("bench", "--sim", "--out", str(tmp_path / "bench.json"))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "bench.json").read_text())["kernels"]["results"]
    measured = {item.split(":")[0] for item in found}
    assert measured == set(ledger.sources()) - {"quant.cu", "kv_write.cu"}  # at load, and a part of every step
    assert all(result["ran"][0] == "ours" for result in found.values())


def test_a_wrong_kernel_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error over the limit, or a NaN, is reported by name and ends with exit code 1; the rest still runs."""
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    checks = [
        Check("a.cu", "off", lambda: (one * 1.01,), lambda: (one.double(),)),
        Check("a.cu", "nan", lambda: (nan,), lambda: (one.double(),)),
        Check("a.cu", "id", lambda: (torch.tensor([3]),), lambda: (torch.tensor([4]),)),
        Check("a.cu", "right", lambda: (one,), lambda: (one.double(),)),
    ]
    monkeypatch.setattr(script, "all_checks", lambda device, scale: checks)
    done = invoke("check", "--sim", "--small")
    assert done.exit_code == 1
    assert "a.cu: off: {'failure': 'ArithmeticError: a.cu, off: error 1.00e-02, allowed 1.00e-04'}" in done.output
    assert "a.cu: right: {'error': 0.0" in done.output and done.output.count("ArithmeticError") == 3


def test_phases_end_at_their_deadlines(tmp_path: Path) -> None:
    """After a phase's limit, or the whole budget, items are skipped and said to be; each phase is on disk at once."""
    now = [0.0]

    def work(seconds: float) -> str:
        now[0] += seconds
        return "done"

    report = Report(tmp_path / "report.json", budget_s=10, clock=lambda: now[0])
    first = report.run("a", [("x", lambda: work(3)), ("y", lambda: work(3)), ("z", lambda: work(3))], limit_s=5)
    assert first == {"x": "done", "y": "done", "z": {"skipped": "out of time"}}
    assert json.loads((tmp_path / "report.json").read_text())["a"]["seconds"] == 6
    second = report.run("b", [("x", lambda: work(4)), ("y", lambda: work(1))], limit_s=100)
    assert second == {"x": "done", "y": {"skipped": "out of time"}}


def test_the_ledger_knows_what_was_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source is verified when all its checks passed, and until its text changes; a failed one stays as it was."""
    path = tmp_path / "VERIFIED.json"
    assert ledger.unverified(path) == ledger.sources() and "norm.cu" in ledger.sources()
    fine: dict[str, Any] = {"error": 0.0, "limit": 0.1}
    results = {"norm.cu": {"a": fine}, "act.cu": {"a": fine, "b": {"failure": "?"}}, "moe.cu": {"a": {"skipped": "?"}}}
    ledger.record({"gpu": "H200"}, results, path)
    assert set(ledger.sources()) - set(ledger.unverified(path)) == {"norm.cu"}
    assert ledger.read(path)["norm.cu"]["gpu"] == "H200"
    monkeypatch.setattr(ledger, "source_hash", lambda source: "another")
    assert "norm.cu" in ledger.unverified(path)
