"""`trio-llm trace`: what it prints and exports, and what it refuses."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.replay.tape import Tape
from tests.replay.test_replay import recorded
from trio_llm.cli.commands import cli


@pytest.fixture(scope="module")
def tape() -> Tape:
    """Return the tape of a run with preemptions."""
    return recorded(num_requests=25)


@pytest.fixture
def record(tape: Tape, tmp_path: Path) -> Path:
    """Return its file."""
    return tape.save(tmp_path / "run.record")


def trace(*arguments: object, columns: int = 160) -> Result:
    """Run the command."""
    return CliRunner().invoke(cli, ["trace", *map(str, arguments)], env={"COLUMNS": str(columns)})


def test_the_summary_tells_what_happened(tape: Tape, record: Path) -> None:
    """It names the engine, steps, requests and preemptions, and says that the replay is exact."""
    shown = " ".join(trace(record).output.split())
    preempted = sum(stats.num_preempted for stats in tape.loop.stats)
    assert f"steps {min(tape.states)} to {max(tape.states)}: " in shown
    assert f"requests: 25, 25 of them ended, {preempted} preemptions" in shown
    assert "12 blocks of 4 tokens" in shown
    assert "every grant and plan is the recorded one" in shown


def test_tables_of_steps_and_requests(tape: Tape, record: Path) -> None:
    """`--steps` and `--requests` print a line for each, and 80 columns are enough for it."""
    steps = list(tape.states)[5:8]
    shown = trace(record, "--steps", steps[0], steps[-1], columns=80).output
    assert [first for line in shown.splitlines() if (first := line[:6].strip()).isdigit()] == list(map(str, steps))
    assert "…" not in shown
    shown = trace(record, "--requests", columns=80).output
    assert sum(line[:6].strip().isdigit() for line in shown.splitlines()) == 25
    assert "…" not in shown


def test_a_reader_that_has_enough_hears_no_error(record: Path) -> None:
    """`trio-llm trace ... | head -1` ends quietly, whatever it prints."""
    for options in (["--format", "csv"], ["--steps", "1", "9999"]):
        command = [sys.executable, "-m", "trio_llm", "trace", str(record), *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""


def test_perfetto_gets_spans_and_counters(tape: Tape, record: Path, tmp_path: Path) -> None:
    """Every step is a span, every request has its phases, and no span is negative."""
    assert trace(record, "--format", "chrome", "-o", tmp_path / "trace.json").exit_code == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert sum(event["name"].startswith("step ") for event in spans) == len(tape.states)
    assert {event["name"] for event in spans} >= {"queued", "prefill", "decode"}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    assert sum(event["name"] == "preempted" for event in events) == sum(s.num_preempted for s in tape.loop.stats)
    assert {event["name"] for event in events if event["ph"] == "C"} == {"blocks", "requests"}


def test_csv_has_a_line_for_each_row(tape: Tape, record: Path) -> None:
    """Its tokens add up to those of all plans."""
    rows = list(csv.DictReader(trace(record, "--format", "csv").output.splitlines()))
    assert len(rows) == sum(len(plan.request_ids) for plan in tape.loop.plans)
    assert sum(int(row["count"]) for row in rows) == sum(sum(plan.counts) for plan in tape.loop.plans)
    assert {row["kind"] for row in rows} == {"prefill", "decode"}


def test_a_file_that_is_cut_off_is_printed_with_a_note(record: Path) -> None:
    """What is whole is shown, and what is missing is named."""
    record.write_bytes(record.read_bytes()[:-3])
    done = trace(record)
    assert done.exit_code == 0
    assert "note: " in done.output
    assert "ends inside a frame" in done.output


@pytest.mark.parametrize("data", [b"", b"hello\n", b"trio-llm record 9\n"])
def test_what_is_no_record_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    """Exit code 1, and no traceback."""
    (tmp_path / "x.record").write_bytes(data)
    done = trace(tmp_path / "x.record")
    assert done.exit_code == 1
    assert done.output.startswith("Error: ") and "x.record" in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_the_record_is_never_the_output(record: Path) -> None:
    """A record is not overwritten by what is made of it, whether it is named or found in its directory."""
    before = record.read_bytes()
    for source in (record, record.parent):
        done = trace(source, "--format", "csv", "--output", record)
        assert done.exit_code == 2
        assert "is what the command reads: it would be overwritten." in done.output
        assert record.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--output", "x"], "--output is for --format chrome and csv."),
        (["--steps", "9", "1"], "There is no step from 9 to 1: the record has 1 to "),
        (["--steps", "100000", "100001"], "There is no step from 100000 to 100001: the record has 1 to "),
        (["--format", "csv", "--requests"], "--steps and --requests print tables: leave out --format."),
        (["--format", "chrome", "--steps", "1", "2"], "--steps and --requests print tables: leave out --format."),
    ],
)
def test_options_that_would_have_no_effect_are_refused(record: Path, options: list[str], reason: str) -> None:
    """An option is followed or refused, never left out silently."""
    done = trace(record, *options)
    assert done.exit_code == 2
    assert f"Error: {reason}" in done.output
