"""Files that are cut off, damaged, forged or of another version: one clear line, or what is whole of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tests.core.loop import HYBRID
from tests.replay.test_replay import recorded
from trio_llm.errors import RecordError
from trio_llm.replay import Replay, files
from trio_llm.replay.frames import Arrival, decode, encode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a file that begins with a state, in the middle of a run."""
    tape = recorded(groups=HYBRID, depth=2)
    begin = list(tape.states)[20]
    return tape.save(tmp_path_factory.mktemp("whole") / "whole.record", begin).read_bytes()


def opened(path: Path, data: bytes) -> Replay:
    """Write a file and open it."""
    path.write_bytes(data)
    return Replay.open(path)


def test_a_file_that_is_cut_off_is_read_as_far_as_it_is_whole(tmp_path: Path, whole: bytes) -> None:
    """Wherever a file ends, its whole frames are replayed and the rest is named, or there is no step to see."""
    path = tmp_path / "cut.record"
    steps, lines = set(), list[str]()
    for end in range(len(whole) - 1, 0, -97):
        try:
            replay = opened(path, whole[:end])
        except RecordError as error:
            lines.append(str(error))
            continue
        steps.add(len(list(replay.walk())))
        if replay.record.notice is not None:
            assert "ends inside a frame: its last " in replay.record.notice
    assert len(steps) > 10
    assert lines and all(str(path) in line and "\n" not in line for line in lines)


def test_a_damaged_byte_is_found(tmp_path: Path, whole: bytes) -> None:
    """No byte of a frame can change unseen: a checksum names the place, or the file seems cut off."""
    rng, lines = random.Random(1), list[str]()
    for _ in range(200):
        at = rng.randrange(len(whole))
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        try:
            assert opened(tmp_path / "bad.record", bytes(data)).record.notice is not None
        except RecordError as error:
            lines.append(str(error))
    assert lines and not any("\n" in line for line in lines)


def _mutated(rng: random.Random, value: object) -> object:
    """Change something somewhere inside a decoded frame."""
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [*value[:at], _mutated(rng, value[at]), *value[at + 1 :]]
    return rng.choice([0, 1, -1, 7, 10**6, 2**40, None, [], "x", True, 0.5])


def test_a_forged_frame_is_refused_in_one_line(tmp_path: Path, whole: bytes) -> None:
    """Frames with right checksums and impossible contents never end in anything but a RecordError."""
    rng = random.Random(2)
    at = whole.index(b"\n") + 1
    places: list[tuple[int, int]] = []
    while at < len(whole):
        length = int.from_bytes(whole[at : at + 4], "little")
        places.append((at + 8, at + 8 + length))
        at += 8 + length
    lines: list[str] = []
    for number in range(300):
        first, end = places[0] if number % 3 == 0 else rng.choice(places)
        forged = msgspec.msgpack.encode(_mutated(rng, msgspec.msgpack.decode(whole[first:end])))
        try:
            frame = decode(forged)
            assert files.framed(frame)[8:] == encode(frame)
            head = files._HEAD.pack(len(forged), files.crc32(forged))
            for _ in opened(tmp_path / "forged.record", whole[: first - 8] + head + forged + whole[end:]).walk():
                pass
        except msgspec.MsgspecError:
            continue
        except RecordError as error:
            lines.append(str(error))
    assert len(lines) > 20
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: b"", "not a record of trio-llm"),
        (lambda _: b"PK\x03\x04 something else", "not a record of trio-llm"),
        (
            lambda data: data.replace(b"record 1\n", b"record 7\n", 1),
            "a record of format 7; trio-llm .* reads format 1",
        ),
        (lambda data: data[: data.index(b"\n") + 1], "it ends before its header"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path: Path, whole: bytes, change: Callable, words: str) -> None:
    """The line names the file and what is wrong with it."""
    with pytest.raises(RecordError, match=rf"bad\.record: .*{words}"):
        opened(tmp_path / "bad.record", change(whole))


def test_a_missing_file_and_an_empty_directory_are_named(tmp_path: Path) -> None:
    """Nothing to read is an error too."""
    with pytest.raises(RecordError, match=r"none\.record: cannot be read: No such file"):
        Replay.open(tmp_path / "none.record")
    with pytest.raises(RecordError, match=r"a directory without \.record files"):
        Replay.open(tmp_path)


def test_a_replay_that_differs_names_the_step(tmp_path: Path) -> None:
    """A record whose arrival is another one is not replayed as if it were right."""
    tape = recorded()
    for at, frame in enumerate(tape.frames):
        if isinstance(frame, Arrival) and frame.request.num_prompt_tokens > 6:
            shorter = replace(frame.request, num_prompt_tokens=frame.request.num_prompt_tokens - 6)
            tape.frames[at] = replace(frame, request=shorter)
    tape.save(tmp_path / "run.record")
    with pytest.raises(RecordError, match=r"step \d+ is planned differently from the record"):
        list(Replay.open(tmp_path / "run.record").walk())
