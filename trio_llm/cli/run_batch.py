"""`trio-llm run-batch`: a file of requests answered offline by the code that serves them, in the file's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import attrs
import click
import msgspec
import trio

from trio_llm.assemble import open_engine
from trio_llm.cli.announce import LoadingDisplay
from trio_llm.cli.output_file import cannot_write, check_output
from trio_llm.cli.settings import Settings
from trio_llm.config import Config
from trio_llm.engine import Engine
from trio_llm.engine.nursery import open_nursery
from trio_llm.server.app import create_app
from trio_llm.server.batches.batch_store import LineRecord, PendingLine
from trio_llm.server.batches.input_file import decode_line
from trio_llm.server.batches.runner import answer_line
from trio_llm.server.batches.service import execute_line

_READ_AHEAD_LINES = 64


class _Line(msgspec.Struct):
    """The required fields of a line."""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    body: dict[str, Any]


class _InvalidLineError(Exception):
    """A line of the input is not a request; nothing was answered."""


@attrs.define
class _Slot:
    """A place in the output for an answer that may arrive after later ones."""

    answered: trio.Event = attrs.field(factory=trio.Event)
    record: LineRecord | None = None


@attrs.define
class _Count:
    """Counts of lines."""

    lines: int = 0
    failed: int = 0


def run(settings: Settings, input: Path, output: Path) -> int:
    """Answer every line and return the exit code: 0, 1 if some requests failed, 2 if the input is no batch.

    The output file appears when it is complete. Raises click.BadParameter if it is the input or cannot be written.
    """
    part = output.with_name(output.name + ".part")
    for path in (output, part):
        check_output(path, input)
    try:
        total = sum(1 for _ in _requests(input))
    except _InvalidLineError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    count = _Count()
    sink = _open(part)
    try:
        with sink:
            trio.run(_answer_file, settings, input, sink, total, count)
        part.replace(output)
    finally:
        if not count.lines:
            part.unlink(missing_ok=True)
    click.echo(f"{count.lines} requests answered, of which {count.failed} with an error: {output}", err=True)
    return 1 if count.failed else 0


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("wb")
    except OSError as error:
        raise cannot_write(path, error) from None


def _requests(path: Path) -> Iterator[tuple[int, bytes, _Line]]:
    """Yield number, text and content of each line that is not empty; hold one at a time."""
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = msgspec.convert(decode_line(text), _Line)
                line.custom_id.encode()
            except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors too.
                raise _InvalidLineError(f"Invalid request on line {number}: {error}") from None
            if line.body.get("stream"):
                raise _InvalidLineError(f"Invalid request on line {number}: a batch cannot stream")
            yield number, text, line


async def _answer_file(settings: Settings, input: Path, sink: BinaryIO, total: int, count: _Count) -> None:
    from tqdm import tqdm

    with LoadingDisplay() as display:
        async with open_engine(settings.config, report=display.report, tune_interpreter=True) as engine:
            display.stop()
            with tqdm(total=total, unit="request", disable=None) as bar:

                def write(record: LineRecord) -> None:
                    sink.write(record.text + b"\n")
                    count.lines += 1
                    count.failed += record.failed
                    bar.update()

                await _answer_lines(engine, settings.config, _requests(input), write)


async def _answer_lines(
    engine: Engine, config: Config, requests: Iterator[tuple[int, bytes, _Line]], write: Callable[[LineRecord], None]
) -> None:
    """Answer requests, as many at once as the engine admits, and write the answers in the requests' order."""
    services = create_app(engine, config).services

    async def execute(endpoint: str, text: bytes, owner: str) -> Mapping[str, Any]:
        return await execute_line(services, endpoint, text, owner)

    # Early answers wait here for those before them. The bound limits memory if one line is slow.
    room = trio.Semaphore(engine.max_requests)
    send, receive = trio.open_memory_channel[_Slot](engine.max_requests)

    async def answer(slot: _Slot, number: int, text: bytes, line: _Line) -> None:
        pending = PendingLine(number - 1, line.custom_id, 0, len(text))
        slot.record = await answer_line(execute, pending, text, line.url, "")
        slot.answered.set()

    async def write_in_order() -> None:
        async for slot in receive:
            await slot.answered.wait()
            assert slot.record is not None
            await trio.to_thread.run_sync(write, slot.record)
            room.release()

    async with open_nursery() as nursery:
        nursery.start_soon(write_in_order)
        with send:
            while some := await trio.to_thread.run_sync(list, islice(requests, _READ_AHEAD_LINES)):
                for request in some:
                    await room.acquire()
                    slot = _Slot()
                    nursery.start_soon(answer, slot, *request)
                    await send.send(slot)
