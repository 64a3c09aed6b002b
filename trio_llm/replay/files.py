"""The file of a record: a line that names it, then frames, each with its length and checksum.

A file may end inside a frame, because its server was killed or still writes it. What is before is whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import attrs
import msgspec

import trio_llm
from trio_llm.errors import RecordError
from trio_llm.replay.frames import FORMAT, Call, Frame, Header, Keys, decode, encode
from trio_llm.replay.state import KEY_BYTES

MAGIC = b"trio-llm record "
SUFFIX = ".record"
_HEAD = struct.Struct("<II")
# Larger than any state, so that a damaged length is told from a file that is cut off.
_MAX_FRAME_BYTES = 2**30
# Bounds on what a header may ask this process to allocate.
_MAX_BLOCKS, _MAX_TOKENS = 2**24, 2**24


def write_head(file: BinaryIO) -> int:
    """Write what a file begins with; return its length in bytes."""
    return file.write(MAGIC + b"%d\n" % FORMAT)


def framed(frame: Frame) -> bytes:
    """Return a frame as it is in a file."""
    payload = encode(frame)
    return _HEAD.pack(len(payload), crc32(payload)) + payload


@attrs.frozen
class Record:
    """The contents of one file.

    Attributes:
        calls: In their order.
        keys: request_id -> the keys of its chunks in the prefix cache.
        notice: What is missing at its end; None if nothing is.
    """

    path: Path
    header: Header
    calls: tuple[Call, ...]
    keys: dict[int, bytes]
    notice: str | None


def read(path: str | Path) -> Record:
    """Read a file, or the newest one of a directory.

    Raises:
        RecordError: It is not a record, of another format, or damaged.
    """
    path = _newest(Path(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from None
    start = _check_head(path, data)
    header: Header | None = None
    calls: list[Call] = []
    keys: dict[int, bytes] = {}
    end = start
    for frame, end in _frames(path, data, start):  # noqa: B007 - the last end is used
        match frame:
            case Header() if header is None:
                header = _checked(path, frame)
            case Keys() if header is not None and frame.first * KEY_BYTES == len(keys.get(frame.request_id, b"")):
                keys[frame.request_id] = keys.get(frame.request_id, b"") + frame.keys
            case Header() | Keys():
                raise RecordError(f"{path}: damaged: a {type(frame).__name__} is where none can be")
            case _ if header is None:
                raise RecordError(f"{path}: damaged: its first frame is no header")
            case _:
                calls.append(frame)
    if header is None:
        raise RecordError(f"{path}: empty: it ends before its header")
    missing = len(data) - end
    notice = f"{path} ends inside a frame: its last {missing} bytes are left out" if missing else None
    return Record(path, header, tuple(calls), keys, notice)


def _newest(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files:
        raise RecordError(f"{path}: a directory without {SUFFIX} files")
    return files[-1]


def _check_head(path: Path, data: bytes) -> int:
    """Return where the first frame begins."""
    line, newline, _ = data[:64].partition(b"\n")
    if not newline or not line.startswith(MAGIC):
        raise RecordError(f"{path}: not a record of trio-llm")
    written = line.removeprefix(MAGIC).decode("ascii", "replace")
    if written != str(FORMAT):
        raise RecordError(
            f"{path}: a record of format {written[:20]}; trio-llm {trio_llm.__version__} reads format {FORMAT}"
        )
    return len(line) + 1


def _frames(path: Path, data: bytes, at: int) -> Iterator[tuple[Frame, int]]:
    """Yield each whole frame, and where it ends."""
    view = memoryview(data)
    while at + _HEAD.size <= len(data):
        length, check = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if length > _MAX_FRAME_BYTES:
            raise RecordError(f"{path}: damaged at byte {at}: a frame of {length} bytes")
        if end > len(data):
            return
        payload = view[at + _HEAD.size : end]
        if crc32(payload) != check:
            raise RecordError(f"{path}: damaged at byte {at}: the checksum is wrong")
        try:
            frame = decode(payload)
        except msgspec.MsgspecError as error:
            raise RecordError(f"{path}: damaged at byte {at}: {error}") from None
        yield frame, end
        at = end


def _checked(path: Path, header: Header) -> Header:
    setup = header.setup
    sizes = [group.block_size for group in setup.groups]
    possible = (
        1 < setup.num_kv_blocks <= _MAX_BLOCKS
        and 0 < setup.max_model_len <= _MAX_TOKENS
        and setup.scheduling_policy in ("fcfs", "priority")
        and 0 <= setup.max_draft_tokens <= 1024
        and sizes
        and all(size > 0 and size.bit_count() == 1 for size in sizes)
        and (setup.lookup is None or 1 <= setup.lookup[0] <= setup.lookup[1])
    )
    if not possible:
        raise RecordError(f"{path}: damaged: its header describes no possible engine")
    return header
