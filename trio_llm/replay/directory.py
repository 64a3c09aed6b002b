"""The files of a record that is being written: one after another, the oldest deleted."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from msgspec.structs import replace

from trio_llm.replay.files import SUFFIX, framed, write_head
from trio_llm.replay.frames import Frame, Header
from trio_llm.replay.state import State

FILES = 8
"""The bound is divided among this many files, so a directory loses an eighth of its history at a time."""

# The names that `RecordDirectory` gives. Who wants to keep a file gives it another one.
_NAME = re.compile(rf"steps-\d{{8}}T\d{{6}}-\d+-\d{{6,}}{re.escape(SUFFIX)}")


class RecordDirectory:
    """Writes frames to files of a directory. All methods may raise OSError.

    Args:
        path: Created if it does not exist. The bound holds for all files in it that a server wrote, this one or one
            before; other names are left alone.
        header: The header of each file; `begin` adds its state.
        max_bytes: Maximum size of all files together. Only a file that is larger all by itself exceeds it.

    Attributes:
        number: Of the file that is being written, from 1 on.
    """

    def __init__(self, path: Path, header: Header, max_bytes: int) -> None:
        self.path, self._header = path, header
        self._max_bytes = max_bytes
        self._run = f"steps-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        self.number = 0
        self._size = self._left = 0
        self._name: Path | None = None
        self._file: BinaryIO | None = None
        path.mkdir(parents=True, exist_ok=True)

    @property
    def full(self) -> bool:
        """Whether the file has its share of the bound, so that another should begin."""
        return self._left < 0

    def begin(self, state: State | None) -> int:
        """Begin the next file with this state; return the number of bytes written."""
        self.close()
        self.number += 1
        self._name = None
        self._left = self._max_bytes // FILES
        head = framed(replace(self._header, state=state))
        self._make_room(len(head) + self._left)
        # A record may hold token ids: only its owner may read it.
        self._name = self._next_name()
        descriptor = os.open(self._name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._size = write_head(self._file) + self._file.write(head)
        self._file.flush()
        return self._size

    def write(self, frames: Iterable[Frame]) -> int:
        """Append frames; return the number of bytes written."""
        assert self._file is not None
        data = b"".join(map(framed, frames))
        self._size += len(data)
        self._left -= len(data)
        if self.full:
            # Calls that came before the state of the next file could be taken are more than this file's share.
            self._make_room(self._size)
        self._file.write(data)
        self._file.flush()
        return len(data)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _next_name(self) -> Path:
        while (path := self.path / f"{self._run}-{self.number:06d}{SUFFIX}").exists():
            self.number += 1
        return path

    def _make_room(self, size: int) -> None:
        """Delete the oldest of the other files until this one fits with `size` bytes."""
        others = (path for path in self.path.iterdir() if _NAME.fullmatch(path.name) and path != self._name)
        files = sorted(others, key=lambda path: (path.stat().st_mtime_ns, path.name))
        sizes = [path.stat().st_size for path in files]
        for at, path in enumerate(files):
            if sum(sizes[at:]) + size <= self._max_bytes:
                return
            path.unlink()
