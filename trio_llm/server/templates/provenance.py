"""Text that remembers which of its characters the template wrote.

A control token in a prompt is real only if the template spelled all of it. So a template's literals are
`TemplateText`, which carries one mark per character through the operations that templates build prompts with. What
users wrote is plain `str`: every filter sees it exactly as it is. The result of any operation that is not tracked
here (`tojson`, `format`, `upper` of non-ASCII text, ...) is plain as well. An omission can therefore lose a control
token that the template meant, which the tests with real templates would show, but can never grant one to a user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Self, SupportsIndex

# One mark per character: who wrote it. The final message's characters are a user's; a prompt that continues the
# message ends behind the last of them.
TEMPLATE, USER, FINAL = "t", "u", "f"


class TemplateText(str):
    """A string with a mark for each of its characters: `TEMPLATE`, `USER` or `FINAL`."""

    __slots__ = ("_marks",)

    _marks: str

    def __new__(cls, text: str = "", marks: str | None = None) -> Self:
        """Make a text; without `marks` it is not the template's."""
        self = super().__new__(cls, text)
        self._marks = USER * len(text) if marks is None else marks
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: object) -> Any:
        if not isinstance(other, str) or hasattr(other, "__html__"):
            return NotImplemented
        return TemplateText(str.__add__(self, other), self._marks + marks_of(other))

    def __radd__(self, other: object) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        return TemplateText(str.__add__(other, self), marks_of(other) + self._marks)

    def __mul__(self, count: SupportsIndex) -> Any:
        return TemplateText(str.__mul__(self, count), self._marks * count)

    def __rmul__(self, count: SupportsIndex) -> Any:
        return self * count

    def __getitem__(self, key: Any) -> TemplateText:
        return TemplateText(str.__getitem__(self, key), self._marks[key])

    def __iter__(self) -> Iterator[str]:
        return map(TemplateText, str.__iter__(self), self._marks)

    def join(self, items: Iterable[str], /) -> str:
        listed = list(items)
        text = str.join(self, listed)  # Raises the usual TypeError.
        return TemplateText(text, self._marks.join(map(marks_of, listed)))

    def strip(self, chars: str | None = None, /) -> Any:
        return self.rstrip(chars).lstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Any:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> Any:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> Any:
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> Any:
        return self[: len(str.removesuffix(self, suffix))]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        text = str.replace(self, old, new, count)
        return TemplateText(text, marks_of(new).join(map(marks_of, self.split(old, count)))) if old else text

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> Any:
        return self._located(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> Any:
        return self._located(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> Any:
        lines: list[Any] = []
        at = 0
        for whole, line in zip(str.splitlines(self, True), str.splitlines(self, keepends), strict=True):
            lines.append(self[at : at + len(line)])
            at += len(whole)
        return lines

    def partition(self, sep: str, /) -> Any:
        return self._around(str.partition(self, sep))

    def rpartition(self, sep: str, /) -> Any:
        return self._around(str.rpartition(self, sep))

    def lower(self) -> str:
        return self._recased(str.lower(self))

    def upper(self) -> str:
        return self._recased(str.upper(self))

    def capitalize(self) -> str:
        return self._recased(str.capitalize(self))

    def title(self) -> str:
        return self._recased(str.title(self))

    def _recased(self, text: str) -> str:
        """Keep the marks where case cannot change the number of characters."""
        return TemplateText(text, self._marks) if self.isascii() else text

    def _around(self, parts: Sequence[str]) -> tuple[TemplateText, ...]:
        first, sep = len(parts[0]), len(parts[0]) + len(parts[1])
        return self[:first], self[first:sep], self[sep:]

    def _located(self, parts: Sequence[str], sep_chars: int) -> list[TemplateText]:
        """Return the same parts as slices of this text; between two of them is a separator or white space."""
        located: list[TemplateText] = []
        at = 0
        for part in parts:
            # With a separator the part begins right here; else only white space comes before it.
            at = at if sep_chars else self.index(part, at)
            located.append(self[at : at + len(part)])
            at += len(part) + sep_chars
        return located


def from_template(text: str) -> TemplateText:
    """Return text that the template, or the server on its behalf, wrote."""
    return TemplateText(text, TEMPLATE * len(text))


def marks_of(text: str) -> str:
    """Return one mark per character; text without marks is a user's."""
    return text._marks if isinstance(text, TemplateText) else USER * len(text)  # pyright: ignore[reportPrivateUsage]


def concat(pieces: Iterable[str]) -> TemplateText:
    """Join pieces of output, their marks kept."""
    listed = list(pieces)
    return TemplateText("".join(listed), "".join(map(marks_of, listed)))


def segments(text: str) -> list[tuple[str, bool]]:
    """Cut text into longest runs of (text, whether the template wrote it)."""
    runs: list[tuple[str, bool]] = []
    at = 0
    for trusted, marks in groupby(marks_of(text), TEMPLATE.__eq__):
        end = at + sum(1 for _ in marks)
        runs.append((str.__getitem__(text, slice(at, end)), trusted))
        at = end
    return runs


def up_to_final(text: str) -> str | None:
    """Cut text behind the final message's last character; None if none of it is there."""
    end = marks_of(text).rfind(FINAL) + 1
    return text[:end] if end else None
