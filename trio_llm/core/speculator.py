"""A scheduler's part in speculation: who has drafts, how far they may go, and where a sequence stands after them.

A row computes the newest token and drafts of what follows. One token is sampled after each of these, and those up to
the first that is not the draft's are kept; the KV beyond them is overwritten. Until then nobody knows at what position
the sequence goes on, so it has no row in a step that is planned meanwhile. Does not know what a draft is worth.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import attrs

from trio_llm.core.running_step import RunningStep
from trio_llm.core.sequence import Sequence
from trio_llm.core.speculate import LookupSizes, PromptLookup
from trio_llm.messages import BlockGrant, StepResult


@attrs.frozen
class Speculation:
    """How a scheduler speculates.

    Attributes:
        most: Drafts of one sequence in a step.
        lookup: How they are looked up; None where they come with the results, from a draft model.
    """

    most: int
    lookup: LookupSizes | None

    def wishes(self, decodes: Seq[Sequence], rows: Seq[Sequence], max_row_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Return the columns `drafts` and `room_ends` of an ask for `rows`; make the drafts of decodes on the way."""
        for sequence in decodes:
            # The token after the last draft is sampled too, and must have its place.
            room = sequence.limits.max_len - 1 - len(sequence.tokens)
            room = max(0, min(self.most, room, max_row_tokens - 1))
            if self.lookup is None:
                sequence.drafts = sequence.drafts[:room]
            else:
                sequence.lookup = sequence.lookup or PromptLookup(self.lookup)
                sequence.drafts = sequence.lookup.propose(sequence.tokens, room)
        ahead = self.most if self.lookup is None else 0
        ends = [min(len(row.tokens) + len(row.drafts) + ahead, row.limits.max_len - 1) for row in rows]
        return tuple([len(row.drafts) for row in rows]), tuple(ends)

    def reaches(self, grant: BlockGrant, step: RunningStep) -> tuple[int, ...]:
        """Return how far a draft model may compute: to the last token but two, as the last one is never a draft."""
        if self.lookup is not None:
            return ()
        columns = zip(step.rows, step.samples, grant.capacities, strict=True)
        return tuple([min(room, row.limits.max_len - 2) if samples else 0 for row, samples, room in columns])

    def settle(self, step: RunningStep, at: int, num_kept: int, result: StepResult) -> None:
        """Let the sequence in a row, which rested, go on after the tokens that it keeps."""
        sequence = step.rows[at]
        sequence.computed = sequence.scheduled = step.ends[at] + num_kept - 1
        sequence.target = sequence.computed + 1
        sequence.drafts = () if result.drafts is None else result.drafts[at]
        if step.grant.drafts[at]:
            step.accepted[at] = num_kept - 1
