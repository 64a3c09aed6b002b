"""Which requests a caller may ask about or cancel: those of its own API key, by the ids of their answers."""

from __future__ import annotations

import attrs

Owner = tuple[str | None, str]
"""Id of the API key, None without one, and the id of the answer."""


@attrs.define(eq=False)
class OwnRequests:
    """The live requests, and the last ones that ended.

    Attributes:
        limit: Maximum number of ended ones kept.
    """

    limit: int
    _samples: dict[Owner, tuple[int, ...]] = attrs.field(factory=dict[Owner, tuple[int, ...]], init=False)
    _owners: dict[int, Owner] = attrs.field(factory=dict[int, Owner], init=False)
    _ended: dict[Owner, None] = attrs.field(factory=dict[Owner, None], init=False)  # the oldest first

    def add(self, key_id: str | None, answer_id: str, samples: tuple[int, ...]) -> None:
        """Keep a request; `samples` are the engine's numbers. An id that is used again means the newer request."""
        owner = key_id, answer_id
        self._forget(owner)
        self._samples[owner] = samples
        self._owners.update(dict.fromkeys(samples, owner))

    def end(self, key_id: str | None, answer_id: str, samples: tuple[int, ...]) -> None:
        """Note that a request has ended: from now on newer ones may take its place."""
        owner = key_id, answer_id
        if self._samples.get(owner) != samples:  # its id was used again
            return
        self._ended[owner] = None
        if len(self._ended) > self.limit:
            self._forget(next(iter(self._ended)))

    def find(self, key_id: str | None, answer_id: str) -> tuple[int, ...]:
        """Return the engine's numbers of a request's samples; empty if the key has no such request."""
        return self._samples.get((key_id, answer_id), ())

    def name(self, key_id: str | None, sample: int) -> str | None:
        """Return the id of the answer that a sample belongs to; None if it is another key's."""
        owner = self._owners.get(sample)
        return owner[1] if owner is not None and owner[0] == key_id else None

    def _forget(self, owner: Owner) -> None:
        self._ended.pop(owner, None)
        for sample in self._samples.pop(owner, ()):
            del self._owners[sample]
