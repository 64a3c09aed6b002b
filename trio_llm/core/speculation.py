"""The scheduler's part of speculative decoding: which rows have drafts, how many, and what their results mean.

A row computes the newest token and the drafts after it. One token is sampled after each of them. Tokens are accepted up
to the first one that differs from its draft, including that one; the KV after it is overwritten. A sequence whose
drafts are unverified cannot be scheduled, because its next position is unknown. This module does not verify drafts.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import attrs

from trio_llm.core.prompt_lookup import LookupSizes, PromptLookup
from trio_llm.core.running_step import RunningStep
from trio_llm.core.sequence import Sequence
from trio_llm.messages import BlockGrant, StepResult


@attrs.frozen
class Speculation:
    """Settings of speculative decoding.

    Attributes:
        max_drafts: Maximum drafts of one sequence in a step.
        lookup: N-gram sizes of prompt look-up; None if a draft model returns drafts with the results.
    """

    max_drafts: int
    lookup: LookupSizes | None

    def draft_columns(
        self, decodes: Seq[Sequence], rows: Seq[Sequence], max_row_tokens: int
    ) -> tuple[tuple[int, ...], ...]:
        """Propose drafts for `decodes`; return the columns `drafts` and `draft_ends` of an ask for `rows`."""
        for sequence in decodes:
            # The token after the last draft is sampled too and needs a position.
            max_drafts = sequence.stop.max_len - 1 - len(sequence.tokens)
            max_drafts = max(0, min(self.max_drafts, max_drafts, max_row_tokens - 1))
            if self.lookup is None:
                sequence.drafts = sequence.drafts[:max_drafts]
            else:
                sequence.lookup = sequence.lookup or PromptLookup(self.lookup)
                sequence.drafts = sequence.lookup.propose(sequence.tokens, max_drafts)
        ahead = self.max_drafts if self.lookup is None else 0
        ends = [min(len(row.tokens) + len(row.drafts) + ahead, row.stop.max_len - 1) for row in rows]
        return tuple([len(row.drafts) for row in rows]), tuple(ends)

    def draft_limits(self, grant: BlockGrant, step: RunningStep) -> tuple[int, ...]:
        """Return per row the position before which a draft model may compute: the last token is never a draft."""
        if self.lookup is not None:
            return ()
        columns = zip(step.rows, step.samples, grant.capacities, strict=True)
        return tuple([min(capacity, row.stop.max_len - 2) if samples else 0 for row, samples, capacity in columns])

    def commit_drafts(self, step: RunningStep, at: int, num_kept: int, result: StepResult) -> None:
        """Let the sequence of a row be scheduled again, after its accepted tokens."""
        sequence = step.rows[at]
        sequence.computed = sequence.scheduled = step.ends[at] + num_kept - 1
        sequence.target = sequence.computed + 1
        sequence.drafts = () if result.drafts is None else result.drafts[at]
        if step.grant.drafts[at]:
            step.accepted[at] = num_kept - 1
