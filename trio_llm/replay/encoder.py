"""Turns what happens to the core into frames. Knows neither files nor threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
from msgspec.structs import replace

from trio_llm.core.prefix import Chain
from trio_llm.messages import BlockAsk, BlockGrant, Commit, Finished, FinishReason, StepPlan, StepResult, Tokens
from trio_llm.params import Submission
from trio_llm.replay.frames import Arrival, Committed, Frame, Keys, Leave, Planned, checksum
from trio_llm.replay.request import Request
from trio_llm.replay.state import KEY_BYTES


@attrs.define(eq=False)
class Encoder:
    """Makes the frames of one record.

    Attributes:
        start_s: Time 0 of the record, on the clock of all times that come in.
        tokens: Whether frames contain token ids.
        speculates: Whether the engine does speculative decoding.
    """

    start_s: float
    tokens: bool
    speculates: bool
    # request_id -> its keys in the prefix cache, and how many of them are in frames.
    _chains: dict[int, tuple[Chain, int]] = attrs.field(factory=dict[int, tuple[Chain, int]])

    def arrived(self, request_id: int, submission: Submission, at_s: float) -> list[Frame]:
        return [Arrival(self._time(at_s), Request.of(request_id, submission, tokens=self.tokens))]

    def left(self, request_id: int, reason: FinishReason, at_s: float) -> list[Frame]:
        return [Leave(self._time(at_s), request_id, reason)]

    def planned(
        self,
        at_s: float,
        prompt_tokens: int | None,
        ask: BlockAsk,
        grant: BlockGrant,
        plan: StepPlan | None,
        chains: Mapping[int, Chain],
    ) -> list[Frame]:
        """Encode a plan; `chains` are those of the sequences that the ask introduces."""
        drafts = ask.drafts if any(ask.drafts) else None
        frames: list[Frame] = [Planned(ask.step, self._time(at_s), prompt_tokens, drafts, checksum(grant, plan))]
        for request_id in ask.released:
            if request_id in self._chains:
                frames += self._new_keys(request_id)
                del self._chains[request_id]
        for request_id, chain in chains.items():
            self._chains[request_id] = chain, 0
        return frames

    def committed(self, at_s: float, request_ids: Sequence[int], result: StepResult, commit: Commit) -> list[Frame]:
        """Encode a result; `request_ids` are the rows of its plan."""
        drafts = result.drafts
        if self.tokens:
            frame = Committed(0, 0, 0, token_ids=result.token_ids, drafts=drafts)
        else:
            frame = Committed(
                0,
                0,
                0,
                counts=_counts(request_ids, commit) if self.speculates else None,
                stopped=self._stopped(commit),
                num_drafts=None if drafts is None else tuple(map(len, drafts)),
            )
        failed = dict(result.failed)
        at_s = self._time(at_s)
        return [replace(frame, step=result.step, at_s=at_s, seconds=round(result.seconds, 6), failed=failed)]

    def _stopped(self, commit: Commit) -> tuple[int, ...]:
        # Usually each event is one row's token, and there is no end to look for.
        if not self.speculates and len(commit.events) == commit.stats.num_generated_tokens:
            return ()
        ends = [(request_id, event) for request_id, event in commit.events if isinstance(event, Finished)]
        return tuple(request_id for request_id, event in ends if event.reason == "stop")

    def new_keys(self) -> list[Frame]:
        """Encode the keys of all sequences that are in no frame yet."""
        return [frame for request_id in self._chains for frame in self._new_keys(request_id)]

    def start_file(self, chains: Mapping[int, Chain]) -> None:
        """Begin a file with these sequences, whose keys it does not have yet."""
        self._chains = {request_id: (chain, 0) for request_id, chain in chains.items()}

    def _new_keys(self, request_id: int) -> list[Frame]:
        chain, known = self._chains[request_id]
        if len(chain.digests) == known:
            return []
        new = chain.digests[known:]
        self._chains[request_id] = chain, known + len(new)
        return [Keys(request_id, known, b"".join([digest[:KEY_BYTES] for digest in new]))]

    def _time(self, at_s: float) -> float:
        return round(at_s - self.start_s, 6)


def _counts(request_ids: Sequence[int], commit: Commit) -> tuple[int, ...]:
    """Return the number of tokens that each row kept."""
    kept = {request_id: len(event.token_ids) for request_id, event in commit.events if isinstance(event, Tokens)}
    return tuple([kept.get(request_id, 0) for request_id in request_ids])
