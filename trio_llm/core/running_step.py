"""A step in flight: its plan, kept until its result is committed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from operator import add, sub

import attrs

from trio_llm.core.queues import Queues
from trio_llm.core.sequence import Sequence
from trio_llm.messages import UNKNOWN, BlockGrant, StepResult, StepStats


@attrs.define(eq=False)
class RunningStep:
    """One planned step.

    Attributes:
        rows: The sequences. One that was preempted since then is ENDED here; see `Sequence.restart`.
        ends: Per row, the number of tokens computed after the step, without drafts.
        samples: Per row, whether it samples a token or yields an embedding.
        prefills: Indices of the rows that are not decodes.
        started: Sequences whose first step this is.
        accepted: Index of a row with drafts -> number of accepted drafts, set by the commit.
    """

    grant: BlockGrant
    rows: list[Sequence]
    started: list[Sequence]
    ends: list[int]
    samples: list[bool]
    prefills: list[int]
    num_tokens: int
    num_prefill_tokens: int
    accepted: dict[int, int] = attrs.field(factory=dict[int, int])

    @classmethod
    def lay_out(
        cls, grant: BlockGrant, rows: list[Sequence], started: list[Sequence]
    ) -> tuple[RunningStep, tuple[int, ...]]:
        """Return the step and its tokens, flattened over the rows; mark the tokens of the sequences as scheduled."""
        token_ids: list[int] = []
        ends = list(map(add, grant.starts, grant.counts))
        samples: list[bool] = []
        prefills: list[int] = []
        num_prefill_tokens = 0
        if grant.drafts:
            ends = list(map(sub, ends, grant.drafts))
        for at, (sequence, start, end) in enumerate(zip(rows, grant.starts, ends, strict=True)):
            tokens = sequence.tokens
            if end - start == 1 and start >= sequence.num_prompt_tokens:
                token_ids.append(tokens[start] if start < len(tokens) else UNKNOWN)
            else:
                token_ids += tokens[start:end]
                prefills.append(at)
                num_prefill_tokens += end - start
            if grant.drafts:
                token_ids += sequence.drafts[: grant.drafts[at]]
            sequence.scheduled = end
            sampled = end == sequence.target
            samples.append(sampled)
            # The next step can compute the sampled token, known or not, unless it is certainly the last one. With
            # drafts its position is unknown, so the sequence is not scheduled until its row is committed.
            if sampled and not grant.drafts and end < sequence.stop.max_len - 1:
                sequence.target = end + 1
        step = cls(grant, rows, started, ends, samples, prefills, len(token_ids), num_prefill_tokens)
        return step, tuple(token_ids)

    def stats(self, result: StepResult, num_generated: int, num_preempted: int, queues: Queues) -> StepStats:
        return StepStats(
            result.step,
            result.seconds,
            len(self.rows),
            self.num_tokens,
            self.num_prefill_tokens,
            num_generated,
            len(queues.running),
            len(queues.waiting) + queues.num_held,
            num_preempted,
            self.grant.stats,
            result.expert_tokens,
            queues.num_held,
            result.kernel_calls,
            _count_above(self.grant.drafts[at] for at in self.accepted),
            _count_above(self.accepted.values()),
        )


def _count_above(lengths: Iterable[int]) -> tuple[int, ...]:
    """Return how many of the lengths are above 0, how many above 1, and so on."""
    longest_first = sorted(lengths, reverse=True)
    return tuple(sum(length > at for length in longest_first) for at in range(max(longest_first, default=0)))


def without_ended(grant: BlockGrant, rows: list[Sequence | None]) -> BlockGrant:
    """Remove the rows of sequences that were aborted since the ask; the next ask releases their blocks."""
    if all(rows):
        return grant
    alive = [sequence is not None for sequence in rows]
    return attrs.evolve(
        grant,
        request_ids=tuple(compress(grant.request_ids, alive)),
        starts=tuple(compress(grant.starts, alive)),
        counts=tuple(compress(grant.counts, alive)),
        new_blocks=tuple(compress(grant.new_blocks, alive)),
        drafts=tuple(compress(grant.drafts, alive)),
        capacities=tuple(compress(grant.capacities, alive)),
        num_admitted=sum(alive[len(alive) - grant.num_admitted :]),
    )
