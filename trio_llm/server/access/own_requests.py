"""Which requests a caller may ask about or cancel: those of its own API key, by the ids of their answers."""

from __future__ import annotations

from collections import OrderedDict

import attrs

Owner = tuple[str | None, str]
"""Id of the API key, None without one, and the id of the answer."""


@attrs.define(eq=False)
class OwnRequests:
    """The newest requests.

    Attributes:
        limit: Maximum number kept, the live ones included.
    """

    limit: int
    _samples: OrderedDict[Owner, tuple[int, ...]] = attrs.field(factory=OrderedDict[Owner, tuple[int, ...]], init=False)
    _owners: dict[int, Owner] = attrs.field(factory=dict[int, Owner], init=False)

    def add(self, key_id: str | None, answer_id: str, samples: tuple[int, ...]) -> None:
        """Keep a request; `samples` are the engine's numbers. An id that is used again means the newer request."""
        owner = key_id, answer_id
        self._forget(owner)
        self._samples[owner] = samples
        self._owners.update(dict.fromkeys(samples, owner))
        if len(self._samples) > self.limit:
            self._forget(next(iter(self._samples)))

    def find(self, key_id: str | None, answer_id: str) -> tuple[int, ...]:
        """Return the engine's numbers of a request's samples; empty if the key has no such request."""
        return self._samples.get((key_id, answer_id), ())

    def name(self, key_id: str | None, sample: int) -> str | None:
        """Return the id of the answer that a sample belongs to; None if it is another key's."""
        owner = self._owners.get(sample)
        return owner[1] if owner is not None and owner[0] == key_id else None

    def _forget(self, owner: Owner) -> None:
        for sample in self._samples.pop(owner, ()):
            del self._owners[sample]
