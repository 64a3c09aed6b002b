"""The script that checks and measures kernels, run on the simulator."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from cuda_kernels import compile as compiling
from tools.kernel_lab import __main__ as script
from tools.kernel_lab import bench, benches, cases, check, end_to_end, ledger, measure, phases, primitives
from tools.kernel_lab.benches import Bench, Target
from tools.kernel_lab.cases import Check
from tools.kernel_lab.device import Captured, Gpu, Simulated, interleaved_us, num_buffers
from tools.kernel_lab.phases import Report, Skip

NAN = math.nan
CEILINGS = {"read_gb_s": 1000.0, "copy_gb_s": 500.0, "bf16_tflop_s": 100.0}


@pytest.fixture(autouse=True)
def nothing_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the package's ledger out of it."""
    monkeypatch.setattr(ledger, "PATH", tmp_path / "VERIFIED.json")
    return ledger.PATH


def invoke(*args: str) -> Result:
    """Run the command line."""
    return CliRunner().invoke(script.main, args)


@pytest.mark.kernels_full
def test_every_check_passes_simulated(tmp_path: Path, nothing_verified: Path) -> None:
    """`check --sim` goes through every phase with every kernel, and calls nothing verified."""
    done = invoke("check", "--sim", "--out", str(tmp_path / "out" / "check.json"))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert list(found) == [
        "environment", "ceilings", "problems", "compile", "primitives", "correctness", "sanitizer",
    ]  # fmt: skip
    checked = {item.split(":")[0] for phase in ("correctness", "primitives") for item in found[phase]["results"]}
    assert checked == set(ledger.sources())
    assert all(result["error"] <= result["limit"] for result in found["correctness"]["results"].values())
    assert all(result["kernels"] for result in found["correctness"]["results"].values())
    assert not nothing_verified.exists()


def test_check_runs_simulated(monkeypatch: pytest.MonkeyPatch, nothing_verified: Path) -> None:
    """The same phases with the checks of two kernels; what there is no tool for is said to be left out."""
    few = lambda device, small: cases.all_checks(device, small=small, sources={"norm.cu", "act.cu"})  # noqa: E731
    monkeypatch.setattr(check, "all_checks", few)
    monkeypatch.setattr(check.tools.shutil, "which", lambda name, path=None: None)
    done = invoke("check", "--sim")
    assert done.exit_code == 0, done.output
    assert "sanitizer: racecheck: skipped: no compute-sanitizer here" in done.output
    assert f"not verified on any GPU in their current version: {', '.join(ledger.sources())}" in done.output
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["norm.cu", "4", "4"] in [row[:3] for row in rows] and not nothing_verified.exists()


@pytest.mark.slow
def test_bench_runs_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench --sim` runs a bench of each kernel with its peers, and the engine beside its peer; it tells no time."""
    first = {b.source: b for b in reversed(list(benches.all_benches(small=True)))}
    monkeypatch.setattr(bench, "all_benches", lambda small: first.values())
    monkeypatch.setattr(bench.tools.shutil, "which", lambda name, path=None: None)
    done = invoke("bench", "--sim", "--out", str(tmp_path / "bench.json"))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "bench.json").read_text())
    results = found["kernels"]["results"]
    assert {item.split(":")[0] for item in results} == set(ledger.sources()) - {"quant.cu", "primitives.cu"}
    assert all(result["us"] is None and result["reached"] == "-" for result in results.values())
    absent = {name for result in results.values() for name, peer in result["peers"].items() if "failure" in peer}
    assert absent == {"SDPA cuDNN, gathered", "varlen_attn, paged"}  # which torch has for GPUs alone
    (step,) = found["end to end"]["results"].values()
    assert step["peers"]["transformers' continuous batching"]["same tokens"] == 1
    assert "profile: ncu: skipped: no ncu here" in done.output


@pytest.mark.kernels_full
def test_every_bench_runs_simulated() -> None:
    """All of them give what their peers give."""
    device, found = Simulated(), {}
    with device.session():
        for one in benches.all_benches(small=True):
            found[one.name] = measure.measure(one, device, dict.fromkeys(CEILINGS, NAN), found)
    wrong = [p for f in found.values() for p in f["peers"].values() if "differs" in p.get("failure", "")]
    assert len(found) > 10 and wrong == []


def test_without_a_gpu_only_simulations_run() -> None:
    """The error says what to do; `once`, which a profiler runs, is there too."""
    if not torch.cuda.is_available():
        done = invoke("check")
        assert done.exit_code == 1 and "there is no GPU here; --sim simulates one" in done.output
    assert invoke("once", "--sim").exit_code == 0


def test_a_wrong_kernel_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error over the limit, or a NaN, is reported by name and ends with exit code 1; the rest still runs."""
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    checks = [
        Check("a.cu", "off", lambda: (one * 1.01,), lambda: (one.double(),)),
        Check("a.cu", "nan", lambda: (nan,), lambda: (one.double(),)),
        Check("a.cu", "id", lambda: (torch.tensor([3]),), lambda: (torch.tensor([4]),)),
        Check("a.cu", "right", lambda: (one,), lambda: (one.double(),)),
    ]
    monkeypatch.setattr(check, "all_checks", lambda device, small: checks)
    done = invoke("check", "--sim", "--small")
    assert done.exit_code == 1
    assert "a.cu: off: failed: ArithmeticError: a.cu, off: error 1.00e-02, allowed 1.00e-04" in done.output
    assert done.output.count("ArithmeticError") == 3
    assert ["a.cu", "4", "1"] in [line.split()[:3] for line in done.stdout.splitlines()]


def test_runs_that_differ_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that another run, or a graph's replay, does not repeat bit for bit is reported."""
    numbers = iter(range(100))
    unsteady = Check("a.cu", "unsteady", lambda: (torch.tensor([float(next(numbers))]),), lambda: ())
    for again in (check._run_again, check._replay):
        with pytest.raises(ArithmeticError, match="unsteady: "):
            again(Simulated(), unsteady, unsteady.run())


BROKEN = {
    "integers and floats": ("__umulhi(", "("),
    "tensor cores bfloat16": ('".trans"', '""'),
    "roundings float16": ('"f"(high), "f"(low)', '"f"(low), "f"(high)'),
    "asynchronous copies": ("ok ? 16 : 0", "16"),
    "approximations": ("-LOG2E * v", "LOG2E * v"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_primitives_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each primitive's check fails where that primitive does something else."""
    text, (old, new) = compiling.expand("primitives.cu"), BROKEN[name]
    assert old in text
    monkeypatch.setattr(compiling, "expand", lambda source: text.replace(old, new))
    with Simulated().session(), pytest.raises((ArithmeticError, Exception), match=r"primitives\.cu|misaligned|bounds"):
        dict(primitives.checks(Simulated()))[name]()


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


def test_what_cannot_be_made_or_run_is_an_entry() -> None:
    """A generator that fails ends its phase with that failure; an item that skips itself says why."""

    def items() -> Iterator[tuple[str, Callable[[], Any]]]:
        def skip() -> None:
            raise Skip("not here")

        yield "skipped", skip
        raise MemoryError("too large")

    report = Report(None, budget_s=10)
    found = report.run("a", items(), limit_s=5)
    assert found["skipped"] == {"skipped": "not here"}
    assert found["making the next item"]["failure"] == "MemoryError: too large"
    assert report.failed == ["a/making the next item"]


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run is under a watchdog that outlasts the budget by its grace and is called off at the end."""
    calls: list[Any] = []
    watchdog = phases.faulthandler
    monkeypatch.setattr(watchdog, "dump_traceback_later", lambda seconds, **options: calls.append((seconds, options)))
    monkeypatch.setattr(watchdog, "cancel_dump_traceback_later", lambda: calls.append("off"))
    with Report(None, budget_s=100).bounded():
        assert calls == [(120.0, {"exit": True, "file": sys.__stderr__})]
    assert calls[1:] == ["off"]


def test_peers_are_timed_in_turn_forward_and_back() -> None:
    """Each pass is ours, peer, peer, ours, and gives the median of each; a drift hits all alike."""
    order: list[str] = []

    class Fake(Simulated):
        sim = False

        def time_us(self, work: Callable[[], None]) -> float:
            work()
            return float(len(order))

    graphs = {n: (Captured(lambda n=n: order.append(n), []), 2) for n in ("ours", "peer")}
    times = interleaved_us(Fake(), graphs)
    assert order == (["ours"] * 10 + ["peer"] * 20 + ["ours"] * 10) * 2
    assert times["ours"] == [20.5 / 2, 60.5 / 2] and times["peer"] == [20.5 / 2, 60.5 / 2]


def measured(passes: dict[str, float], monkeypatch: pytest.MonkeyPatch, one: Bench, **earlier: Any) -> dict[str, Any]:
    """Measure a bench with given times."""
    monkeypatch.setattr(measure, "interleaved_us", lambda device, graphs: {n: [passes[n]] * 2 for n in graphs})
    return measure.measure(one, Simulated(), CEILINGS, earlier)


def test_times_are_set_against_ceilings_peers_and_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floor from this run's bandwidth, ratio to each peer, and whether the target was reached."""
    x = torch.ones(4)
    makers = {
        "slower": lambda: x.clone,
        "wrong": lambda: lambda: x * 2,
        "absent": lambda: (_ for _ in ()).throw(NotImplementedError("no such thing")),
    }
    one = Bench("a.cu", "a", 80_000_000, 0, Target("of floor", 0.5, 0.9), lambda device: (x.clone, makers))
    found = measured({"ours": 100.0, "slower": 150.0}, monkeypatch, one)
    assert (found["us"], found["floor_us"], found["of_floor"], found["reached"]) == (100, 80, 0.8, "first")
    assert found["peers"]["slower"] == {"difference": 0.0, "buffers": 1, "us": 150.0, "times_faster": 1.5}
    assert "differs from ours by 1 " in found["peers"]["wrong"]["failure"]
    assert found["peers"]["absent"] == {"failure": "NotImplementedError: no such thing"}


@pytest.mark.parametrize(
    ("target", "us", "reached"),
    [
        (Target("of floor", 0.5, 0.9), 160.1, "no"),
        (Target("of floor", 0.5, 0.9), 85.0, "good"),
        (Target("us", 120, 90), 119.0, "first"),
        (Target("us", 120, 90), 121.0, "no"),
        (Target("TFLOP/s", 10, 20), 90.0, "first"),
        (Target("times", 1.3, 1.6, versus="other"), 100.0, "good"),
        (Target("times", 1.3, 1.6, versus="never run"), 100.0, "-"),
        (Target("us", 120, 90), NAN, "-"),
    ],
)
def test_targets(target: Target, us: float, reached: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of target is judged in its own direction; what was not measured reaches nothing."""
    one = Bench("a.cu", "a", 80_000_000, 10**9, target, lambda device: (lambda: torch.ones(1), {}))
    assert measured({"ours": us}, monkeypatch, one, other={"us": 170.0})["reached"] == reached


WITHOUT_A_SERVER = """
import sys
absent = {"trio", "quart", "quart_trio", "hypercorn", "msgspec", "cattrs", "structlog", "llguidance", "tokenizers"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from tools.kernel_lab.__main__ import main
main(["check", "--help"])
"""


def test_kernels_are_checked_without_the_packages_of_a_server() -> None:
    """A machine with a GPU may have torch and CuPy and nothing else."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_SERVER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Compare every kernel with float64" in done.stdout


def test_the_engines_floor_is_all_weights_and_the_context(tmp_path: Path) -> None:
    """A step reads the checkpoint once and each sequence's keys and values once."""
    model = end_to_end.write_checkpoint(tmp_path, {"hidden_size": 64, "vocab_size": 1536})
    run = end_to_end.Run(model, 3, Simulated(), (10, 2, 4))
    weights, config = (
        (tmp_path / "model.safetensors").stat().st_size,
        json.loads((tmp_path / "config.json").read_text()),
    )
    elements = 2 * config["num_key_value_heads"] * config["head_dim"] * config["num_hidden_layers"]
    assert run.floor_bytes == weights + 3 * (10 + (2 + 4) / 2) * elements * 2
    assert [len(prompt) for prompt in run.prompts] == [10] * 3 and run.prompts[0] != run.prompts[1]


def test_a_gpu_captures_after_one_run_and_times_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call runs once before the capture and once in it; a time is between two events, other data read before."""
    told: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("event")

        def synchronize(self) -> None:
            told.append("wait")

        def elapsed_time(self, end: object) -> float:
            return 0.25

    @contextlib.contextmanager
    def named(*given: object, **options: object) -> Iterator[None]:
        told.append(("in", options.get("capture_error_mode")))
        yield
        told.append("out")

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: told.append("wait"))
    graph = SimpleNamespace(replay=lambda: told.append("replay"))
    fakes = {"Event": Event, "Stream": lambda: stream, "CUDAGraph": lambda: graph, "stream": named, "graph": named,
             "current_stream": lambda: stream, "synchronize": lambda: None}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    gpu = Gpu()
    captured = gpu.capture([lambda: told.append("a"), lambda: told.append("b")])
    assert told == [("in", None), "a", "b", "out", "wait", ("in", "thread_local"), "a", "b", "out"]
    told.clear()
    gpu.__dict__["_other_data"] = SimpleNamespace(sum=lambda: told.append("other data"))
    assert gpu.time_us(captured.replay) == 250
    assert told == ["other data", "event", "replay", "event", "wait"]


def test_buffers_push_each_other_out_of_the_cache() -> None:
    """As many as fill three times the second-level cache; one where it is small, or larger than that by itself."""
    h200 = SimpleNamespace(cache_bytes=50 * 2**20)
    assert num_buffers(h200, 8 * 2**20) == 19 and num_buffers(h200, 10**9) == 1  # type: ignore[arg-type]
    assert num_buffers(Simulated(), 100) == 1
