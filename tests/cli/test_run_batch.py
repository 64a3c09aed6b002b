"""`trio-llm run-batch`: order, exit codes, and lines that are no requests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.server.stub import continuation, open_stub
from trio_llm.cli import run_batch
from trio_llm.cli.commands import cli
from trio_llm.config import Config
from trio_llm.engine import Engine
from trio_llm.errors import CheckpointError


@pytest.fixture(autouse=True)
def stub_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command open an engine without torch that admits three requests at a time."""

    @asynccontextmanager
    async def open_engine(config: Config, **_: Any) -> AsyncIterator[Engine]:
        async with open_stub(max_batch_size=2, max_waiting_batches=1) as engine:
            yield engine

    monkeypatch.setattr(run_batch, "open_engine", open_engine)


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    """Write a completion as a line of a batch."""
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", **body}}


def run(directory: Path, *lines: Any) -> tuple[int, str, list[Any] | None]:
    """Run the command over lines; return its exit code, what it said, and the output's lines if there are any."""
    source, target = directory / "in.jsonl", directory / "out.jsonl"
    source.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
    result = CliRunner().invoke(cli, ["run-batch", "-i", str(source), "-o", str(target)])
    answers = [json.loads(text) for text in target.read_text().splitlines()] if target.exists() else None
    return result.exit_code, result.output, answers


def test_answers_stand_in_the_order_of_the_requests(tmp_path: Path) -> None:
    """Long and short answers, more than the engine admits at once, come out in the input's order, each its own."""
    lengths = [40, 1, 3, 30, 2, 2, 2, 25, 1, 9]
    requests = [line(f"r{i}", prompt=f"p{i}", max_tokens=n, ignore_eos=True) for i, n in enumerate(lengths)]
    code, told, answers = run(tmp_path, *requests, "")
    assert code == 0
    assert answers is not None
    assert [answer["custom_id"] for answer in answers] == [f"r{i}" for i in range(len(lengths))]
    texts = [answer["response"]["body"]["choices"][0]["text"] for answer in answers]
    assert texts == [continuation(f"p{i}", n) for i, n in enumerate(lengths)]
    assert "10 requests answered, of which 0 with an error" in told


def test_a_refused_request_is_a_line_and_exit_code_1(tmp_path: Path) -> None:
    """A request that the endpoint refuses has its error in its place, and the command says so by its code."""
    code, told, answers = run(
        tmp_path, line("good", max_tokens=2), line("bad", max_tokens=-1), line("too", max_tokens=1)
    )
    assert code == 1
    assert "3 requests answered, of which 1 with an error" in told
    assert answers is not None
    assert [answer["response"]["status_code"] for answer in answers] == [200, 400, 200]
    assert "max_tokens" in answers[1]["response"]["body"]["error"]["message"]


def test_a_body_that_is_no_text_is_an_error_of_its_line(tmp_path: Path) -> None:
    """Half a surrogate pair or a number out of range in one body is that line's 400; the others are answered."""
    broken = [
        json.dumps(line("b", prompt="X")).replace("X", "\\ud800"),
        json.dumps(line("c", top_p=7)).replace("7", "1e999"),
    ]
    code, _, answers = run(tmp_path, line("a", max_tokens=1), *broken, line("d", max_tokens=1))
    assert code == 1
    assert answers is not None
    assert [answer["response"]["status_code"] for answer in answers] == [200, 400, 400, 200]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "property name"),
        ("[]", "Expected `object`"),
        ({**line("b"), "url": "/v1/models"}, "Invalid enum value '/v1/models'"),
        ({**line("b"), "method": "GET"}, "Invalid enum value 'GET'"),
        ({"custom_id": "b"}, "missing required field `method`"),
        (line("b", stream=True), "a batch cannot stream"),
    ],
)
def test_a_line_that_is_no_request_ends_the_run_before_it_begins(tmp_path: Path, bad: Any, reason: str) -> None:
    """The number of the line and what is wrong with it, exit code 2, and no output at all."""
    code, told, answers = run(tmp_path, line("a"), "", bad, line("c"))
    assert code == 2
    assert told.startswith("error: Invalid request on line 3: ")
    assert reason in told
    assert answers is None
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    """A file that is read is not overwritten: neither as the output, nor as what becomes it, nor by another name."""
    source, other = tmp_path / "x.part", tmp_path / "link"
    source.write_text(text := json.dumps(line("a")))
    other.symlink_to(source)
    for target in (source, tmp_path / "x", other):
        done = CliRunner().invoke(cli, ["run-batch", "-i", str(source), "-o", str(target)])
        assert done.exit_code == 2
        assert "is what the command reads: it would be overwritten." in done.output
        assert source.read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {"x.part", "link"}


def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names the file and the reason, and no model was opened for it."""
    monkeypatch.setattr(run_batch, "open_engine", None)
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(line("a")))
    done = CliRunner().invoke(cli, ["run-batch", "-i", str(source), "-o", str(tmp_path / "no" / "out")])
    assert done.exit_code == 2
    assert f"Error: Invalid value for '--output' / '-o': '{tmp_path}/no/out.part' cannot be written: " in done.output
    assert "No such file or directory." in done.output


def test_a_run_that_answers_nothing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model cannot be loaded, no empty file is left beside the input."""

    def refuse(*_: Any, **__: Any) -> None:
        raise CheckpointError("no such model")

    monkeypatch.setattr(run_batch, "open_engine", refuse)
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(line("a")))
    done = CliRunner().invoke(cli, ["run-batch", "-i", str(source), "-o", str(tmp_path / "out")])
    assert isinstance(done.exception, CheckpointError)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
