"""A smaller model that guesses what the model is about to sample.

It computes what the model computes and keeps, out of KV tensors of its own that the same block tables address: a block
that is shared, skipped or freed is so for both. Then it goes on by itself, sampling with each row's own parameters and
with the very noise that the model will use at that position, so that a guess is right wherever the two models agree
well enough. Whatever it guesses, the output is the model's alone; knows nothing of what is made of its guesses.

Letters: B rows of a step, S tokens, R rows that want drafts, M blocks per table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import StepPlan
from trio_llm.model.device import Device
from trio_llm.model.draft_model import DraftModel
from trio_llm.model.input_batch import InputRows, PlanRows
from trio_llm.model.kv_cache import KVCache
from trio_llm.model.sampler import Sampler
from trio_llm.model.sampling_rows import SamplingRows


@attrs.frozen(eq=False)
class DraftRows:
    """What the draft model is to compute in a step. Columns have one entry per row.

    Attributes:
        rows: [B], permanent rows.
        starts: Position of each row's first token.
        token_ids: What the model computed and kept, followed by the token it sampled last where drafts are wanted.
        wanted: How many drafts; slots for all but the last of them follow the row's tokens.
    """

    rows: NDArray[np.intp]
    starts: NDArray[np.int64]
    token_ids: Sequence[Sequence[int]]
    wanted: Sequence[int]

    @classmethod
    def after(cls, plan: StepPlan, batch: PlanRows, kept: Mapping[int, Sequence[int]], most: int) -> DraftRows:
        """Follow a step of the model.

        Args:
            kept: Index of a row in the batch -> the tokens it sampled that count; rows that failed have none.
            most: Drafts of one row.
        """
        token_ids: list[Sequence[int]] = []
        wanted: list[int] = []
        for at, (start, reach, draft) in enumerate(zip(plan.starts, plan.reaches, batch.drafts, strict=True)):
            known = plan.token_ids[batch.offsets[at] : batch.lasts[at] + 1 - len(draft)]
            sampled = kept.get(at, ())
            tokens = [*known, *sampled[:-1]]
            room = reach - start - len(tokens)
            wanted.append(max(0, min(most, room)) if sampled else 0)
            token_ids.append([*tokens, sampled[-1]] if wanted[-1] else tokens)
        return cls(batch.index, batch.starts, token_ids, wanted)


class Drafter:
    """A draft model at work beside a model, whose rows and sampler it shares."""

    def __init__(
        self,
        draft: DraftModel,
        num_blocks: int,
        inputs: InputRows,
        sampling: SamplingRows,
        sampler: Sampler,
        device: Device,
    ) -> None:
        self._draft, self._device = draft, device
        self._inputs, self._sampling, self._sampler = inputs, sampling, sampler
        self._kv = KVCache(draft.layout, num_blocks, device.torch_device)

    def propose(
        self, plan: StepPlan, batch: PlanRows, kept: Mapping[int, Sequence[int]]
    ) -> tuple[tuple[int, ...], ...]:
        """Compute what a step of the model computed and kept, then go on from it; return each row's drafts.

        Args:
            kept: As in `DraftRows.after`.
        """
        step = DraftRows.after(plan, batch, kept, self._draft.most)
        lengths = np.array([len(tokens) for tokens in step.token_ids])
        ends = step.starts + lengths
        drafts: list[list[int]] = [[] for _ in step.wanted]
        hidden = self._forward(step.rows, step.starts, step.token_ids)
        asking = [at for at, wanted in enumerate(step.wanted) if wanted]
        (lasts,) = self._device.send([(lengths.cumsum() - 1)[asking]])
        hidden = hidden.index_select(0, lasts)
        going_on = asking
        while going_on:
            guessed = self._sample(step.rows[going_on], ends[going_on] + len(drafts[going_on[0]]), hidden)
            for at, token_id in zip(going_on, guessed, strict=True):
                if token_id >= 0:  # else nothing may follow, and the draft ends here
                    drafts[at].append(token_id)
            going_on = [
                at
                for at, token_id in zip(going_on, guessed, strict=True)
                if token_id >= 0 and len(drafts[at]) < step.wanted[at]
            ]
            if going_on:
                hidden = self._go_on(step.rows[going_on], ends[going_on], [drafts[at] for at in going_on])
        for at in asking:
            self._sampling.take_back(int(step.rows[at]), int(ends[at]))
        return tuple(map(tuple, drafts))

    def _go_on(self, rows: NDArray[np.intp], ends: NDArray[np.int64], drafts: Sequence[Sequence[int]]) -> Tensor:
        """Compute the newest draft of each row as if it were the output."""
        for row, draft in zip(rows.tolist(), drafts, strict=True):
            self._sampling.suppose(row, draft[-1])
        return self._forward(rows, ends + (len(drafts[0]) - 1), [draft[-1:] for draft in drafts])

    def _sample(self, rows: NDArray[np.intp], positions: NDArray[np.int64], hidden: Tensor) -> list[int]:
        selected = self._sampling.select(rows, positions).without_logprobs()
        return self._sampler.sample(self._draft.model.logits(hidden), selected).token_ids.tolist()

    def _forward(self, rows: NDArray[np.intp], starts: NDArray[np.int64], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Return the hidden states [S, H]."""
        batch = self._inputs.resend(rows, starts, tokens, self._draft.groups, self._draft.layout)
        return self._draft.model.forward(batch, self._kv)
