"""A smaller model that drafts the tokens that the model is about to sample.

It computes every token that the model computes and accepts. It has KV tensors of its own under the model's block
tables: a block that is shared, skipped or freed is so for both. Then it samples drafts with each row's own parameters
and with the noise that the model will use at that position, so a draft is accepted whenever the two models agree well
enough. Drafts never change the output.

Letters: B rows of a step, S tokens, R rows that want drafts, M blocks per table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import StepPlan
from trio_llm.model.device.device import Device
from trio_llm.model.loading.draft_model import DraftModel
from trio_llm.model.ops.dispatch import Dispatch
from trio_llm.model.paged.kv_cache import KVCache
from trio_llm.model.sampling.row_params import SamplingRows
from trio_llm.model.sampling.sampler import Sampler
from trio_llm.model.step.decode_graphs import DecodeGraphs, Outputs
from trio_llm.model.step.input_rows import InputRows, PlanRows


@attrs.frozen(eq=False)
class DraftRows:
    """What the draft model computes in a step. Columns have one entry per row.

    Attributes:
        rows: [B], permanent rows.
        starts: Position of each row's first token.
        token_ids: Tokens that the model computed and accepted, then its last sampled token if drafts are wanted.
        num_drafts: Number of drafts; slots for all but the last of them follow the row's tokens.
    """

    rows: NDArray[np.intp]
    starts: NDArray[np.int64]
    token_ids: Sequence[Sequence[int]]
    num_drafts: Sequence[int]

    @classmethod
    def after(
        cls, plan: StepPlan, batch: PlanRows, accepted: Mapping[int, Sequence[int]], max_drafts: int
    ) -> DraftRows:
        """Follow a step of the model.

        Args:
            accepted: Index of a row in the batch -> its accepted tokens; failed rows have none.
            max_drafts: Drafts of one row.
        """
        token_ids: list[Sequence[int]] = []
        num_drafts: list[int] = []
        for at, (start, limit, draft) in enumerate(zip(plan.starts, plan.draft_limits, batch.drafts, strict=True)):
            known = plan.token_ids[batch.offsets[at] : batch.lasts[at] + 1 - len(draft)]
            sampled = accepted.get(at, ())
            tokens = [*known, *sampled[:-1]]
            room = limit - start - len(tokens)
            num_drafts.append(max(0, min(max_drafts, room)) if sampled else 0)
            token_ids.append([*tokens, sampled[-1]] if num_drafts[-1] else tokens)
        return cls(batch.index, batch.starts, token_ids, num_drafts)


class Drafter:
    """Runs a draft model with the rows and the sampler of the model that it drafts for."""

    def __init__(
        self,
        draft: DraftModel,
        num_blocks: int,
        inputs: InputRows,
        sampling: SamplingRows,
        sampler: Sampler,
        device: Device,
        dispatch: Dispatch,
    ) -> None:
        self._draft, self._device, self._dispatch = draft, device, dispatch
        self._inputs, self._sampling, self._sampler = inputs, sampling, sampler
        self._kv = KVCache(draft.layout, num_blocks, device.torch_device)
        self._graphs: DecodeGraphs | None = None

    def decode_graphs(self, logits: Tensor, max_context: int) -> DecodeGraphs:
        """Return graphs, still to be captured, that replay the small steps from then on. Arguments as for these."""
        tables = [self._inputs.tables.tables[group] for group in self._draft.groups]
        padding_row, layout = self._inputs.tables.padding_row, self._draft.layout
        self._graphs = DecodeGraphs(self._draft.model, self._kv, layout, tables, padding_row, logits, max_context)
        return self._graphs

    def propose(
        self, plan: StepPlan, batch: PlanRows, accepted: Mapping[int, Sequence[int]]
    ) -> tuple[tuple[int, ...], ...]:
        """Compute the tokens that the model computed and accepted, then sample on; return each row's drafts.

        Args:
            accepted: As in `DraftRows.after`.
        """
        step = DraftRows.after(plan, batch, accepted, self._draft.max_drafts)
        lengths = np.array([len(tokens) for tokens in step.token_ids])
        ends = step.starts + lengths
        drafts: list[list[int]] = [[] for _ in step.num_drafts]
        drafting = [at for at, num in enumerate(step.num_drafts) if num]
        lasts = (lengths.cumsum() - 1)[drafting]
        outputs = self._compute(step.rows, step.starts, step.token_ids, lasts, is_mixed=batch.is_mixed)
        active = drafting
        while active:
            guessed = self._sample(step.rows[active], ends[active] + len(drafts[active[0]]), outputs)
            for at, token_id in zip(active, guessed, strict=True):
                if token_id >= 0:  # else no token may follow, and the draft ends here
                    drafts[at].append(token_id)
            active = [
                at
                for at, token_id in zip(active, guessed, strict=True)
                if token_id >= 0 and len(drafts[at]) < step.num_drafts[at]
            ]
            if active:
                outputs = self._append_drafts(step.rows[active], ends[active], [drafts[at] for at in active])
        for at in drafting:
            self._sampling.roll_back(int(step.rows[at]), int(ends[at]))
        return tuple(map(tuple, drafts))

    def _append_drafts(
        self, rows: NDArray[np.intp], ends: NDArray[np.int64], drafts: Sequence[Sequence[int]]
    ) -> Outputs:
        """Append the newest draft of each row; return what comes after it."""
        for row, draft in zip(rows.tolist(), drafts, strict=True):
            self._sampling.append_draft(row, draft[-1])
        newest = [draft[-1:] for draft in drafts]
        return self._compute(rows, ends + (len(drafts[0]) - 1), newest, np.arange(len(rows)), is_mixed=False)

    def _sample(self, rows: NDArray[np.intp], positions: NDArray[np.int64], outputs: Outputs) -> list[int]:
        selected = self._sampling.select(rows, positions).without_logprobs()
        return self._sampler.sample(outputs.logits, selected, outputs.likeliest).token_ids.tolist()

    def _compute(
        self,
        rows: NDArray[np.intp],
        starts: NDArray[np.int64],
        tokens: Sequence[Sequence[int]],
        wanted: NDArray[np.int64],
        *,
        is_mixed: bool,
    ) -> Outputs:
        """Compute tokens; return what comes after the `wanted`, which are indices in S."""
        num_tokens = sum(map(len, tokens))
        size = None if self._graphs is None else self._graphs.size_for(num_tokens, is_mixed=is_mixed)
        if self._graphs is not None and size is not None:
            outputs = self._graphs.replay(self._inputs.resend_decodes(rows, starts, tokens, size), self._dispatch)
            if len(wanted) == num_tokens:
                return outputs.of_first(num_tokens)
            (places,) = self._device.send([wanted])
            return outputs.of(places)
        (places,) = self._device.send([wanted])
        batch = self._inputs.resend(rows, starts, tokens, self._draft.groups, self._draft.layout)
        hidden = self._draft.model.forward(batch, self._kv).index_select(0, places)
        return Outputs(self._draft.model.logits(hidden) if len(wanted) else hidden, None)
