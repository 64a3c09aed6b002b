"""The run that has one short loan of a GPU: rehearsed on the simulator, with a fault and a hang on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.kernel_lab import engine_tests, gather_wheels, parts, run_all, steps, worker
from tools.kernel_lab.device import Simulated
from tools.kernel_lab.parts import OTHERS, SOURCES, Command

ROOT = Path(__file__).parents[2]


def run(folder: Path, *options: str) -> tuple[int, dict[tuple[str, str], dict[str, Any]], str]:
    """Run `all --sim`; return its exit code, its results by phase and item, and the summary."""
    command = [sys.executable, "-m", "tools.kernel_lab", "all", "--sim", "--out", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert (folder / "summary.txt").read_text() == done.stdout, done.stderr
    return done.returncode, {(line["phase"], line["item"]): line["result"] for line in lines}, done.stdout


@pytest.mark.timeout(300)
def test_a_fault_and_a_hang_cost_their_source_only(tmp_path: Path) -> None:
    """Both are named with the item, the rest of their items as not run; the other parts get their whole run."""
    only = [word for part in (*OTHERS, "sample.cu", "act.cu", "quant.cu") for word in ("--only", part)]
    trouble = ["--rehearse", "act.cu", "fault", "--rehearse", "quant.cu", "hang"]
    code, found, summary = run(tmp_path, "--budget", "240", "--item-limit", "15", *only, *trouble)
    assert code == 1
    assert found["check", "act.cu: silu torch.bfloat16"]["failure"] == "the process died: exit code -6"
    assert found["check", "quant.cu: quantize_rows torch.bfloat16"]["failure"] == "not done within 15 s"
    why = "not run: the process died in act.cu: silu torch.bfloat16"
    assert found["check", "act.cu: gelu_tanh torch.float16"]["skipped"] == why
    assert found["time", "act.cu: time"]["skipped"] == why
    assert "failed: not done within 15 s" in summary and why in summary
    assert "worker.py" in (tmp_path / "log.txt").read_text()  # the stacks of what was ended
    others = {key: result for key, result in found.items() if "act.cu" not in key[1] and "quant.cu" not in key[1]}
    assert {phase for phase, _ in others} == {stage.phase for stage in run_all.STAGES}
    assert not any("failure" in result for result in others.values())
    assert {phase for (phase, _), result in others.items() if "skipped" in result} == {"engine", "tools"}
    assert found["engine", "engine: pytest -m gpu"]["outcomes"].keys() == {"skipped"}
    kernels = found["check", "sample.cu: greedy, plain, filtered"]["kernels"]
    assert kernels == ["likeliest THREADS=512", "draw THREADS=512"]
    entries = json.loads((tmp_path / "VERIFIED.simulated.json").read_text())
    assert len(entries["sample.cu"]["specialisations"]) == 3 and entries["sample.cu"]["open"] == {}
    assert entries["act.cu"]["specialisations"] == [] and len(entries["act.cu"]["open"]) == 4
    assert not (tmp_path / "VERIFIED.json").exists()


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    """Without any time, what there was to do is named, and nothing has failed."""
    code, found, summary = run(tmp_path, "--budget", "0", "--only", "quant.cu")
    assert code == 0
    assert found and all("skipped" in result for result in found.values()), found
    assert "quant.cu: quantize_rows torch.bfloat16: left out: out of time" in summary or "time was over" in summary


def test_every_part_has_its_stage() -> None:
    """Nothing is forgotten; primitives and attention come first, ours is timed before peers are."""
    assert {part for stage in run_all.STAGES for part in stage.parts} == {*OTHERS, *SOURCES}
    assert SOURCES[:2] == ("primitives.cu", "paged_attn.cu")
    phases = [stage.phase for stage in run_all.STAGES]
    assert phases.index("check") < phases.index("steps") < phases.index("time") < phases.index("peers")


class Lost(Simulated):
    """A device that a failed item has taken down."""

    def is_lost(self) -> bool:
        return True


@pytest.mark.parametrize(("device", "code", "last"), [(Simulated(), 0, "done"), (Lost(), worker.LOST, "lost")])
def test_a_process_ends_where_its_device_is_lost(device: Simulated, code: int, last: str) -> None:
    """A failure is an item's own, unless the device says that nothing will work any more."""
    said: list[dict[str, Any]] = []

    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    phases = {"check": lambda command: [("a", lambda: 1), ("b", fail), ("c", lambda: 3)]}
    command = json.dumps({"phase": "check", "seconds": 60, "ceilings": {}})
    assert worker.serve(phases, device, [command], said.append) == code
    results = {record["item"]: record["result"] for record in said if "item" in record}
    assert results["a"] == {"result": 1} and "illegal memory access" in results["b"]["failure"]
    assert ("c" in results) == (last == "done") and last in said[-1]


def test_the_engines_tests_are_items(tmp_path: Path) -> None:
    """Each outcome is said as it comes; those that would begin too late are left out."""
    tests = tmp_path / "test_them.py"
    tests.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_fine(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no such thing')\ndef test_not_here(): pass\n"
    )
    said: list[dict[str, Any]] = []
    assert engine_tests.run([str(tests)], 60, said.append) == {"outcomes": {"passed": 1, "failure": 1, "skipped": 1}}
    results = {record["item"].partition("::")[2]: record["result"] for record in said if "item" in record}
    assert results["test_fine"] == {"passed": True} and "no such thing" in results["test_not_here"]["skipped"]
    assert "assert 1 == 2" in results["test_wrong"]["failure"] and [r for r in said if "begin" in r]
    late: list[dict[str, Any]] = []
    assert engine_tests.run([str(tests)], 0, late.append) == {"outcomes": {"skipped": 3}}


def test_kernels_come_before_what_no_kernel_takes() -> None:
    """The engine's tests have an order, for time may run out: what runs on kernels first. None is left out."""
    assert [Path(path).name for path in parts.ENGINE_TESTS] == [
        "test_engine_on_kernels.py",
        "test_engine_in_float32.py",
    ]
    assert {ROOT / path for path in parts.ENGINE_TESTS} == set((ROOT / "tests/gpu").glob("test_*.py"))


def test_whole_steps_are_replayed() -> None:
    """Each batch size of each model, with the launches of ours that its graph holds; nothing is timed here."""
    device = Simulated()
    with device.session():
        found = {name: action() for name, action in steps.items(device, {})}
    assert list(found) == ["step of small, B=1", "step of small, B=2"]
    assert all(result["launches"] > 5 and result["us"] != result["us"] for result in found.values())


def test_what_travels_is_what_is_needed_and_not_there() -> None:
    """Every dependency of the project is carried or comes with torch, CuPy and transformers."""
    names = {gather_wheels._name(one) for one in gather_wheels.requirements()}
    assert {"trio", "quart-trio", "hypercorn", "msgspec", "pytest", "hypothesis"} <= names
    assert names.isdisjoint(gather_wheels.THERE) and "openai" not in names
    tests = {gather_wheels._name(one) for one in gather_wheels.requirements()} & gather_wheels.TESTS
    assert tests == gather_wheels.TESTS and gather_wheels.tree_bytes() < gather_wheels.LIMIT_BYTES


def test_ceilings_reach_the_parts() -> None:
    """What the machine measured is in the commands of later phases; what it did not is not a number."""
    this = run_all.Run(Path(), 60, 10, sim=True)
    this.results["machine"] = {"machine: read_gb_s": {"value": 4000.0}, "machine: copy_gb_s": {"failure": "?"}}
    assert this._ceilings["read_gb_s"] == 4000 and this._ceilings["copy_gb_s"] != this._ceilings["copy_gb_s"]
    assert Command("time", 1.0, this._ceilings).ceilings["read_gb_s"] == 4000
