"""JSON values over a pipe, each with a length prefix."""

from __future__ import annotations

import json
import struct
from typing import IO, Any

_LENGTH = struct.Struct("!Q")


def read_frame(stream: IO[bytes]) -> Any:
    """Read one value.

    Raises:
        EOFError: The stream ends before it, or in the middle of it.
    """
    return json.loads(_read(stream, _LENGTH.unpack(_read(stream, _LENGTH.size))[0]))


def frame(value: Any) -> bytes:
    """Return the bytes of one value."""
    data = json.dumps(value).encode()
    return _LENGTH.pack(len(data)) + data


def _read(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data
