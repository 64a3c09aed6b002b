"""The input file of a batch: read line by line, checked as a whole before anything of it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import count
from typing import Any, BinaryIO, cast

from trio_llm.server.storage.batches import LineError, PendingLine

MAX_LINES = 50_000
MAX_LINE_BYTES = 2 * 1024 * 1024
_MAX_REPORTED_ERRORS = 100
_MAX_CUSTOM_ID_CHARS = 512


class InvalidInputError(Exception):
    """The input file is not a batch."""

    def __init__(self, errors: list[LineError]) -> None:
        super().__init__()
        self.errors = errors


class InputLines:
    """Iterates over the work list of an input file; never holds more of it than a line.

    Raises:
        InvalidInputError: At the end, with what is wrong; at once when there is too much of it.
    """

    def __init__(self, file: BinaryIO, endpoint: str) -> None:
        self._file = file
        self._endpoint = endpoint
        self._errors: list[LineError] = []
        # Digests, all of one size: the ids themselves would be a quarter of some files.
        self._custom_ids: set[bytes] = set()

    def __iter__(self) -> Iterator[PendingLine]:
        position = requests = 0
        for number in count(1):
            text = self._file.readline(MAX_LINE_BYTES + 1)
            if not text:
                break
            start, position = position, position + len(text)
            if not text.strip():
                continue
            requests += 1
            if requests > MAX_LINES:
                self._errors.append(LineError("too_many_lines", f"A batch has at most {MAX_LINES} requests."))
                break
            custom_id = self._check(number, text)
            if custom_id is not None and not self._errors:
                yield PendingLine(number - 1, custom_id, start, len(text))
            if len(self._errors) >= _MAX_REPORTED_ERRORS or len(text) > MAX_LINE_BYTES:
                break
        if self._errors:
            raise InvalidInputError(self._errors)

    def _check(self, number: int, text: bytes) -> str | None:
        """Return the line's custom_id, or note what is wrong with it."""

        def wrong(code: str, message: str, param: str | None = None) -> None:
            self._errors.append(LineError(code, message, number, param))

        if len(text) > MAX_LINE_BYTES:
            return wrong("line_too_long", f"Line {number} is longer than {MAX_LINE_BYTES} bytes.")
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            return wrong("invalid_json_line", f"Invalid request on line {number}: it is not valid JSON.")
        if not isinstance(line, dict):
            return wrong("invalid_request", f"Invalid request on line {number}: it is not a JSON object.")
        request = cast("dict[str, Any]", line)
        custom_id = request.get("custom_id")
        if not isinstance(custom_id, str) or not _is_custom_id(custom_id):
            what = f"a string of 1 to {_MAX_CUSTOM_ID_CHARS} characters"
            return wrong("invalid_request", f"Line {number} has no custom_id ({what}).", "custom_id")
        if self._is_known(custom_id):
            return wrong("duplicate_custom_id", f"The custom_id of line {number} was used before.", "custom_id")
        if request.get("method") != "POST":
            return wrong("invalid_method", f"Line {number}: the method must be POST.", "method")
        if request.get("url") != self._endpoint:
            return wrong("mismatched_url", f"Line {number}: the url must be {self._endpoint}, the batch's.", "url")
        if not isinstance(request.get("body"), dict):
            return wrong("invalid_request", f"Line {number}: the body must be a JSON object.", "body")
        if request["body"].get("stream"):
            return wrong("invalid_request", f"Line {number}: a batch cannot stream.", "body.stream")
        return custom_id

    def _is_known(self, custom_id: str) -> bool:
        """Tell whether an id came before, and remember it."""
        before = len(self._custom_ids)
        self._custom_ids.add(hashlib.blake2b(custom_id.encode(), digest_size=16).digest())
        return len(self._custom_ids) == before


def _is_custom_id(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(text) <= _MAX_CUSTOM_ID_CHARS
