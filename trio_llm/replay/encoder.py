"""Turns what happens to the core into frames. Knows neither files nor threads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from zlib import crc32

import attrs

from trio_llm.core.prefix import Chain
from trio_llm.messages import Commit, Finished, FinishReason, StepResult
from trio_llm.params import Submission
from trio_llm.replay.frames import Arrival, Committed, Frame, Keys, Leave, Planned
from trio_llm.replay.request import Request
from trio_llm.replay.state import KEY_BYTES


@attrs.frozen
class Encoder:
    """Makes the frames of calls. They are small, and keep no plan or grant alive.

    Attributes:
        start_s: Time 0 of the record, on the clock of all times that come in.
        tokens: Whether frames contain token ids.
        speculates: Whether the engine does speculative decoding.
    """

    start_s: float
    tokens: bool
    speculates: bool

    def arrived(self, request_id: int, submission: Submission, at_s: float) -> Arrival:
        return Arrival(at_s - self.start_s, Request.of(request_id, submission, tokens=self.tokens))

    def left(self, request_id: int, reason: FinishReason, at_s: float) -> Leave:
        return Leave(at_s - self.start_s, request_id, reason)

    def planned(
        self, step: int, at_s: float, prompt_tokens: int | None, drafts: tuple[int, ...], decisions: bytes
    ) -> Planned:
        """Encode a plan; `drafts` is the column of the ask, and `decisions` are those of the grant and the plan."""
        return Planned(step, at_s - self.start_s, prompt_tokens, drafts if any(drafts) else None, crc32(decisions))

    def committed(self, at_s: float, result: StepResult, commit: Commit) -> Committed:
        """Encode a result."""
        tokens, drafts = self.tokens, result.drafts
        return Committed(
            result.step,
            at_s - self.start_s,
            result.seconds,
            counts=tuple(map(len, commit.token_ids)) if self.speculates and not tokens else None,
            stopped=() if tokens else _stopped(commit),
            failed=dict(result.failed),
            num_drafts=None if tokens or drafts is None else tuple(map(len, drafts)),
            token_ids=result.token_ids if tokens else None,
            drafts=drafts if tokens else None,
        )


class KeyEncoder:
    """Makes the frames of the keys that sequences get in the prefix cache, for one file.

    Args:
        chains: Of the sequences that the core has when the file begins.
    """

    def __init__(self, chains: Mapping[int, Chain]) -> None:
        # request_id -> its keys, and how many of them are in frames.
        self._chains = {request_id: (chain, 0) for request_id, chain in chains.items()}

    def planned(self, released: Iterable[int], chains: Mapping[int, Chain]) -> list[Frame]:
        """Encode the last keys of the sequences that a plan released; `chains` are of those that it introduced."""
        frames: list[Frame] = []
        for request_id in released:
            if request_id in self._chains:
                frames += self._new(request_id)
                del self._chains[request_id]
        for request_id, chain in chains.items():
            self._chains[request_id] = chain, 0
        return frames

    def new(self) -> list[Frame]:
        """Encode the keys of all sequences that are in no frame yet."""
        return [frame for request_id in self._chains for frame in self._new(request_id)]

    def _new(self, request_id: int) -> list[Frame]:
        chain, known = self._chains[request_id]
        if len(chain.digests) == known:
            return []
        new = chain.digests[known:]
        self._chains[request_id] = chain, known + len(new)
        return [Keys(request_id, known, b"".join([digest[:KEY_BYTES] for digest in new]))]


def _stopped(commit: Commit) -> tuple[int, ...]:
    """Return the requests that ended for another reason than their length."""
    events = (*commit.first, *commit.last)
    return tuple([request_id for request_id, event in events if isinstance(event, Finished) and event.reason == "stop"])
