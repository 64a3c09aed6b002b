"""A server's record: what is in its files, how large they get, and what happens when they cannot be written."""

from __future__ import annotations

import random
import stat
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.engine.fakes import HashStub, StubRunner, open_stub
from trio_llm.engine import Engine, recorder
from trio_llm.errors import ConfigError
from trio_llm.params import SamplingParams, Submission
from trio_llm.replay import Replay
from trio_llm.replay.directory import RecordDirectory
from trio_llm.replay.frames import Arrival, Leave, encode
from trio_llm.replay.machine import Machine

SMALL: dict[str, Any] = {"max_batch_size": 4, "max_num_batched_tokens": 24, "max_waiting_batches": 20}


async def busy(engine: Engine, num_requests: int = 30) -> None:
    """Serve random requests, some of which leave early."""
    rng = random.Random(1)

    async def one(submission: Submission, patience: int) -> None:
        async with engine.open_stream(submission) as stream:
            async for _ in stream:
                if stream.num_tokens > patience:
                    break

    async with trio.open_nursery() as nursery:
        for _ in range(num_requests):
            prompt = [rng.randrange(3), *range(rng.randrange(1, 40))]
            params = SamplingParams(max_tokens=rng.randrange(1, 40))
            nursery.start_soon(one, Submission(prompt, params), rng.choice([1000, 1000, 5]))
            await trio.lowlevel.checkpoint()


def files_of(directory: Path) -> list[Path]:
    """Return the files of a record, the oldest first."""
    return sorted(directory.glob("*.record"))


def value(engine: Engine, name: str) -> float:
    """Return a counter."""
    return engine.registry.get_sample_value(f"trio_llm:record_{name}_total", {"model_name": "stub", "engine": "0"}) or 0


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("spec_method", ["none", "ngram"])
async def test_a_server_records_itself(tmp_path: Path, asynchronous: bool, tokens: bool, spec_method: str) -> None:
    """A replay makes each grant and plan again, and ends where the server ended."""
    runner = HashStub(num_kv_blocks=14)
    settings = {**SMALL, "max_model_len": 128, "async_scheduling": asynchronous, "record_tokens": tokens}
    async with open_stub(runner, record=str(tmp_path), spec_method=spec_method, **settings) as engine:
        await busy(engine)
        assert value(engine, "dropped_calls") == 0
    (file,) = files_of(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    replay = Replay.open(tmp_path)
    last = [replay.scheduler.num_running for _ in replay.walk()][-1]
    assert (last, replay.scheduler.num_waiting) == (0, 0)
    assert replay.record.notice is None
    assert sum(isinstance(call, Arrival) for call in replay.record.calls) == 30
    assert any(isinstance(call, Leave) for call in replay.record.calls)
    prompts = [call.request.prompt for call in replay.record.calls if isinstance(call, Arrival)]
    assert all((prompt is not None) == tokens for prompt in prompts)


async def test_a_record_without_tokens_has_none(tmp_path: Path) -> None:
    """What clients sent and got is in no file, in any encoding that a token or a text has in memory or in msgpack."""
    secret = tuple(range(40, 60))
    async with open_stub(StubRunner(), record=str(tmp_path)) as engine:
        params = SamplingParams(max_tokens=4, stop=("mysecret",), stop_token_ids=(61,))
        async with engine.open_stream(Submission(secret, params)) as stream:
            await stream.collect()
    data = files_of(tmp_path)[0].read_bytes()
    assert bytes(secret) not in data
    assert b"".join(bytes((0, 0, 0, i)) for i in secret[:4]) not in data
    assert b"mysecret" not in data


async def test_files_stay_within_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest files are deleted, other files are not, and each file that is left can be replayed."""
    monkeypatch.setattr(recorder, "_GATHER_S", 0.0)
    mine = [tmp_path / name for name in ("mine.record", "steps-incident.record", "steps-20260102T030405-6.record")]
    for path in mine:
        path.write_bytes(b"kept")
    bound = 2**14
    async with open_stub(HashStub(), record=str(tmp_path), record_max_bytes=bound, **SMALL) as engine:
        while value(engine, "bytes") < 4 * bound:
            await busy(engine, 20)
    files = [path for path in files_of(tmp_path) if path not in mine]
    assert sum(path.stat().st_size for path in files) <= bound or len(files) == 1
    assert [path.read_bytes() for path in mine] == [b"kept"] * len(mine)
    first = [Replay.open(path) for path in files]
    for before, after in pairwise(first):
        machine = Machine(before.setup, before.record.keys, tokens=False, state=before.record.header.state)
        for call in before.record.calls:
            machine.apply(call)
        assert encode(machine.state()) == encode(after.record.header.state)


async def test_a_burst_makes_room_for_itself(tmp_path: Path) -> None:
    """Calls that came while the thread was held up are more than a file's share: older files go, within the bound."""
    async with open_stub(HashStub(), record=str(tmp_path / "first"), **SMALL) as engine:
        await busy(engine, 20)
    record = Replay.open(tmp_path / "first").record
    bound = files_of(tmp_path / "first")[0].stat().st_size * 5 // 2
    files = RecordDirectory(tmp_path / "then", record.header, bound)
    for _ in range(3):
        files.begin(None)
        files.write(record.calls)
        assert sum(path.stat().st_size for path in files_of(tmp_path / "then")) <= bound
    files.close()
    assert len(files_of(tmp_path / "then")) == 2


async def test_calls_are_dropped_rather_than_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs drops calls, which a metric counts; the file after them begins with the state."""
    hangs = threading.Event()
    write = recorder.RecordDirectory.write
    monkeypatch.setattr(recorder.RecordDirectory, "write", lambda *args: hangs.wait(60) and write(*args))
    monkeypatch.setattr(recorder, "_MAX_CALLS", 40)
    monkeypatch.setattr(recorder, "_GATHER_S", 0.0)
    async with open_stub(HashStub(), record=str(tmp_path), **SMALL) as engine:
        await busy(engine)
        assert value(engine, "dropped_calls") > 0
        hangs.set()
        while len(files_of(tmp_path)) < 2:
            await busy(engine, 3)
        await busy(engine, 3)  # The second file may have begun with the last step.
    first, second = map(Replay.open, files_of(tmp_path)[:2])
    assert len(list(first.walk())) > 0
    assert first.last_step < second.first_step
    assert len(list(second.walk())) > 0


async def test_a_disk_that_is_full_ends_the_record_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are answered as before, and every further call counts as dropped."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorder.RecordDirectory, "write", full)
    monkeypatch.setattr(recorder, "_GATHER_S", 0.0)
    async with open_stub(HashStub(), record=str(tmp_path), **SMALL) as engine:
        while not value(engine, "dropped_calls"):
            await busy(engine)


async def test_a_directory_that_cannot_be_written_is_a_setting_that_is_wrong(tmp_path: Path) -> None:
    """The engine does not start, and the error names setting, value and reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"record = .*file.*: cannot be written: "):
        async with open_stub(record=str(tmp_path / "file")):
            pass
