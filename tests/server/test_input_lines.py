"""The lines of a batch's input file, read as strangers' lines."""

from __future__ import annotations

import io
from typing import Any

import pytest

from trio_llm.config import LimitsConfig
from trio_llm.server.batches.input_file import InputLines, InvalidInputError, line_body

GOOD = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "stream": 0}}'


def read(text: bytes) -> list[Any]:
    """Return the lines of a file of this text."""
    return list(InputLines(io.BytesIO(text), "/v1/completions", LimitsConfig()))


@pytest.mark.parametrize("text", [GOOD, b"\xef\xbb\xbf" + GOOD + b"\r\n", b"\n \t\n" + GOOD, GOOD + b"\n\n"])
def test_a_line_is_read_whatever_an_editor_makes_of_it(text: bytes) -> None:
    """A mark of the byte order, line ends of Windows and blank lines change nothing."""
    (line,) = read(text)
    assert line.custom_id == "a"
    assert line_body(text[line.position :][: line.length]) == b'{"prompt": "x", "stream": 0}'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (GOOD.replace(b'"a"', b"5"), "custom_id"),
        (GOOD.replace(b'"a"', b"9" * 5000), "custom_id"),
        (GOOD.replace(b"0}", b"1}"), "stream"),
        (GOOD.replace(b'"method"', b'"custom_id": "b", "method"'), "a key occurs twice"),
        (GOOD[:-1] + b', "body": {"prompt": "y"}}', "a key occurs twice"),
    ],
)
def test_a_line_that_can_be_read_in_two_ways_is_refused(line: bytes, says: str) -> None:
    """Numbers are no ids, and no key counts twice: the line that is checked is the line that runs."""
    with pytest.raises(InvalidInputError) as caught:
        read(line)
    assert [error.line for error in caught.value.errors] == [1]
    assert says in caught.value.errors[0].message + str(caught.value.errors[0].param)
