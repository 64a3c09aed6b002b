"""One request of a record in a file of its own, and a test of it without a server.

    from trio_llm.replay import capsule

    def test_the_long_prompt_is_not_preempted():
        lives = capsule.run("incidents/long-prompt.record")
        assert not lives[42].preempted

A capsule begins with the whole state of the core just before the request arrived and ends with its end, so all that
shared its steps or its blocks is in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from trio_llm.errors import RecordError
from trio_llm.messages import Commit, Failed, Finished
from trio_llm.replay.files import framed, write_head
from trio_llm.replay.frames import Arrival, Keys, Leave
from trio_llm.replay.lives import Life, follow
from trio_llm.replay.machine import Machine
from trio_llm.replay.state import State

if TYPE_CHECKING:
    from trio_llm.replay.replay import Replay


def cut(replay: Replay, request_id: int, path: Path) -> Path:
    """Write the capsule of a request; see `Replay.cut`."""
    record = replay.record
    if path.exists() and path.samefile(record.path):
        raise RecordError(f"{path}: the record itself: a capsule would overwrite it")
    machine = Machine(replay.setup, record.keys, tokens=record.header.tokens, state=record.header.state)
    begin: int | None = None
    state: State | None = None
    for at, call in enumerate(record.calls):
        if isinstance(call, Arrival) and call.request.request_id == request_id:
            begin, state = at, machine.state()
        made = machine.apply(call)
        left = isinstance(call, Leave) and call.request_id == request_id
        if begin is not None and state is not None and (left or _ends(made, request_id)):
            _write(replay, path, state, begin, at + 1)
            return path
    what = "arrive" if begin is None else "end"
    raise RecordError(f"request {request_id} does not {what} within {record.path}")


def run(path: str | Path) -> dict[int, Life]:
    """Replay a capsule, or any record, to its end; return the life of each request by its id.

    Raises:
        RecordError: The file cannot be read, or this version of the core decides otherwise than the one that wrote it.
    """
    from trio_llm.replay.replay import Replay

    lives, _ = follow(Replay.open(path))
    return {life.request_id: life for life in lives}


def _ends(made: object, request_id: int) -> bool:
    events = made.events if isinstance(made, Commit) else ()
    return any(one == request_id and isinstance(event, Finished | Failed) for one, event in events)


def _write(replay: Replay, path: Path, state: State, begin: int, end: int) -> None:
    record = replay.record
    with path.open("wb") as file:
        write_head(file)
        file.write(framed(replace(record.header, state=state)))
        for request_id, keys in record.keys.items():
            file.write(framed(Keys(request_id, 0, keys)))
        for call in record.calls[begin:end]:
            file.write(framed(call))
