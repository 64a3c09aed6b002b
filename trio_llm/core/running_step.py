"""A step in flight: what was planned, kept until its result is committed."""

from __future__ import annotations

import attrs

from trio_llm.core.queues import Queues
from trio_llm.core.sequence import Sequence
from trio_llm.messages import UNKNOWN, BlockGrant, StepResult, StepStats


@attrs.define(eq=False)
class RunningStep:
    """One planned step.

    Attributes:
        rows: The sequences. One that was preempted since stands here as ended; see `Sequence.restart`.
        ends: Per row, the tokens that are computed once the step is done.
        samples: Per row, whether a token (or a vector) comes of it.
        prefills: Indices of the rows that are not plain decodes.
        started: Sequences whose first step this is.
    """

    grant: BlockGrant
    rows: list[Sequence]
    started: list[Sequence]
    ends: list[int]
    samples: list[bool]
    prefills: list[int]
    num_tokens: int
    num_prefill_tokens: int

    @classmethod
    def lay_out(
        cls, grant: BlockGrant, rows: list[Sequence], started: list[Sequence]
    ) -> tuple[RunningStep, tuple[int, ...]]:
        """Return the step and its tokens, flat over the rows; the sequences count as scheduled so far."""
        token_ids: list[int] = []
        ends: list[int] = []
        samples: list[bool] = []
        prefills: list[int] = []
        num_decodes = 0
        for at, (sequence, start, count) in enumerate(zip(rows, grant.starts, grant.counts, strict=True)):
            tokens, end = sequence.tokens, start + count
            if count == 1 and start >= len(sequence.prompt):
                token_ids.append(tokens[start] if start < len(tokens) else UNKNOWN)
                num_decodes += 1
            else:
                token_ids += tokens[start:end]
                prefills.append(at)
            ends.append(end)
            sequence.scheduled = end
            sampled = end == sequence.target
            samples.append(sampled)
            # What is sampled can be computed in the next step, known or not, unless it is surely the last token.
            if sampled and end < sequence.limits.max_len - 1:
                sequence.target = end + 1
        num_prefill_tokens = len(token_ids) - num_decodes
        step = cls(grant, rows, started, ends, samples, prefills, len(token_ids), num_prefill_tokens)
        return step, tuple(token_ids)

    def stats(self, result: StepResult, num_generated: int, queues: Queues) -> StepStats:
        return StepStats(
            result.step,
            result.seconds,
            len(self.rows),
            self.num_tokens,
            self.num_prefill_tokens,
            num_generated,
            len(queues.running),
            len(queues.waiting) + queues.num_held,
            len(self.grant.preempted),
            self.grant.stats,
            result.expert_tokens,
            queues.num_held,
            result.kernel_calls,
        )
