"""The part of one dimension of a tensor that a rank holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
from torch import Tensor


@attrs.frozen
class Span:
    """`count` entries from `first` on, of a dimension of `size`; in memory `length`, of which the last are zeros.

    A dimension that the ranks do not divide is padded at its end.
    """

    size: int
    first: int
    count: int
    length: int

    @classmethod
    def whole(cls, size: int) -> Span:
        """Return all entries."""
        return cls(size, 0, size, size)

    @property
    def is_whole(self) -> bool:
        return self.count == self.size

    def times(self, entries: int) -> Span:
        """Return the same part of a dimension in which each entry is `entries` long."""
        return Span(self.size * entries, self.first * entries, self.count * entries, self.length * entries)

    def within(self, size: int, offset: int) -> Span:
        """Return the same entries of a dimension of `size` in which this one begins at `offset`."""
        return Span(size, offset + self.first, self.count, self.length)


def whole(size: int | Span) -> Span:
    """Return a span as it is, and a size as the span of all its entries."""
    return size if isinstance(size, Span) else Span.whole(size)


def sizes(spans: Sequence[Span]) -> tuple[int, ...]:
    """Return the shape of the whole tensor."""
    return tuple(span.size for span in spans)


def counts(spans: Sequence[Span]) -> tuple[int, ...]:
    """Return the shape of the part."""
    return tuple(span.count for span in spans)


def share_of(nbytes: int, spans: Sequence[Span]) -> int:
    """Return the bytes of the part, given those of the whole tensor."""
    return nbytes * math.prod(counts(spans)) // max(1, math.prod(sizes(spans)))


def take(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    """Return a view of the part of a whole tensor."""
    return tensor[tuple(slice(span.first, span.first + span.count) for span in spans)]
