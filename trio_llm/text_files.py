"""Small text files that a user or a model's directory names: regular ones, of sane size, in UTF-8."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MAX_SETTINGS_BYTES = 1 << 20  # Of a file that a setting names: the longest known template has 20 KB.


class UnreadableFileError(Exception):
    """Its text says what is wrong with the file, without its name."""


def read_text_file(path: Path, max_bytes: int) -> str:
    """Read a file. A pipe or a device is refused: it could last for ever.

    Raises:
        UnreadableFileError: It is missing, not regular, too large, unreadable or not UTF-8.
    """
    try:
        # Opening a pipe without a writer would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if stat.S_ISFIFO(found.st_mode):  # As of a shell's <(...); it cannot be read a second time, at SIGHUP.
                raise UnreadableFileError("not a regular file but a pipe: write its text to a file, and name that")
            if not stat.S_ISREG(found.st_mode):
                raise UnreadableFileError("not a regular file")
            if found.st_size > max_bytes:
                raise UnreadableFileError(f"{found.st_size} bytes, more than the {max_bytes} allowed")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(max_bytes).decode()
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise UnreadableFileError("no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise UnreadableFileError("not UTF-8") from None
        reason = error.strerror if isinstance(error, OSError) else error  # ValueError: a NUL in the path.
        raise UnreadableFileError(f"cannot be read: {reason}") from None
