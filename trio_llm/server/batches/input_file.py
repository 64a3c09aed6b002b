"""The input file of a batch: read line by line, and checked completely before any line runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import count
from typing import Any, BinaryIO, cast

from trio_llm.config import LimitsConfig
from trio_llm.errors import InvalidRequestError
from trio_llm.server.batches.batch_store import LineError, PendingLine
from trio_llm.server.bodies.size_limits import flag_of

MAX_LINES = 50_000
# Bytes of a line around its body: custom_id (escaped), method and url.
_ENVELOPE_BYTES = 8 * 1024
_MAX_REPORTED_ERRORS = 100
_MAX_CUSTOM_ID_CHARS = 512
_SPACE = re.compile(r"[ \t\n\r]*")


class RepeatedKeyError(ValueError):
    """A line has a key twice: readers differ in which of the two counts."""


class _Repeated(dict[str, Any]):
    """An object with a key that occurs twice."""


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeated(found)


# Integers as floats: those of thousands of digits take quadratic time.
_DECODER = json.JSONDecoder(parse_int=float, object_pairs_hook=_as_object)


class InvalidInputError(Exception):
    """The input file is not a valid batch."""

    def __init__(self, errors: list[LineError]) -> None:
        super().__init__()
        self.errors = errors


class InputLines:
    """Iterates over the lines of an input file; holds one line at a time.

    Raises:
        InvalidInputError: At the end, with the errors; at once if there are too many.
    """

    def __init__(self, file: BinaryIO, endpoint: str, limits: LimitsConfig) -> None:
        self._file = file
        self._endpoint = endpoint
        self._max_line_bytes = limits.max_body_bytes + _ENVELOPE_BYTES
        self._errors: list[LineError] = []
        # Digests have a fixed size: the ids would be a quarter of some files.
        self._custom_ids: set[bytes] = set()

    def __iter__(self) -> Iterator[PendingLine]:
        position = requests = 0
        for number in count(1):
            text = self._file.readline(self._max_line_bytes + 1)
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
            if len(self._errors) >= _MAX_REPORTED_ERRORS or len(text) > self._max_line_bytes:
                break
        if self._errors:
            raise InvalidInputError(self._errors)

    def _check(self, number: int, text: bytes) -> str | None:
        """Return the line's custom_id, or record its error."""

        def wrong(code: str, message: str, param: str | None = None) -> None:
            self._errors.append(LineError(code, message, number, param))

        if len(text) > self._max_line_bytes:
            limit = f"at most {self._max_line_bytes} bytes ({flag_of('max_body_bytes')})"
            return wrong("line_too_long", f"Line {number} is too long: {limit}.")
        try:
            line = decode_line(text)
        except RepeatedKeyError as error:
            return wrong("invalid_request", f"Invalid request on line {number}: {error}.")
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
        """Return whether an id occurred before, and remember it."""
        before = len(self._custom_ids)
        self._custom_ids.add(hashlib.blake2b(custom_id.encode(), digest_size=16).digest())
        return len(self._custom_ids) == before


def _is_custom_id(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(text) <= _MAX_CUSTOM_ID_CHARS


def decode_line(text: bytes) -> Any:
    """Decode a line. More lenient than JSON: an invalid body is an error of its line, not of the batch.

    Raises:
        RepeatedKeyError: A key of the line itself occurs twice. Those of its body are the body's error.
        ValueError, RecursionError: Not JSON in UTF-8, or nested too deeply.
    """
    line: object = _DECODER.decode(text.decode("utf-8-sig"))  # Editors of Windows begin files with a mark.
    if isinstance(line, _Repeated):
        raise RepeatedKeyError("a key occurs twice")
    return line


def line_body(text: bytes) -> bytes:
    """Return the JSON text of a line's `body`, for the parser of request bodies.

    Raises:
        InvalidRequestError: The line is not a JSON object with a body, so the file has changed since its check.
    """
    try:
        line = text.decode()
        at = line.index("{") + 1
        while True:
            key, at = _DECODER.raw_decode(line, _after_space(line, at))
            start = _after_space(line, line.index(":", at) + 1)
            _, at = _DECODER.raw_decode(line, start)
            if key == "body":
                return line[start:at].encode()
            at = line.index(",", at) + 1
    except (ValueError, RecursionError):
        message = "The input file no longer holds this line, a JSON object with a body."
        raise InvalidRequestError(message, param="body") from None


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()
