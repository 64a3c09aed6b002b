"""One step on the device: plan in, one forward over the ragged batch, tokens out.

Steps are launched from one thread only. On a GPU a launch queues the work and returns; the next step may be launched
before the result of this one is read, and finds on the device what this one sampled. The runner knows rows and
tensors; what a sequence wants next, and where its blocks come from, is decided elsewhere. Applying a plan sets values
that depend on the plan alone, so a failed step may be run again, whole or in parts.

Letters: B rows of this step, S its tokens, R rows sampled in it, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import (
    CORRUPTED,
    UNKNOWN,
    Admission,
    ModelInfo,
    PoolingParams,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from trio_llm.model.device import Cpu
from trio_llm.model.dispatch import Dispatch, dispatching
from trio_llm.model.draft_model import DraftModel
from trio_llm.model.drafter import Drafter
from trio_llm.model.input_batch import Input, InputRows
from trio_llm.model.kept import kept_tokens
from trio_llm.model.kv_cache import KVCache, KVLayout
from trio_llm.model.launched import Launched
from trio_llm.model.loader import Model
from trio_llm.model.memory import MemoryBudget
from trio_llm.model.pooling import Pooler
from trio_llm.model.prompt_logprobs import PromptScorer, is_finite
from trio_llm.model.recent_tokens import RecentTokens
from trio_llm.model.sampler import FAILURES, NOT_FINITE, Sampled, Sampler
from trio_llm.model.sampling_rows import SamplingRows


class Runner:
    """A model, its KV pool and the rows of the sequences that run.

    Attributes:
        info: What floors above know of the model.
        budget: Where the memory went.
    """

    def __init__(
        self,
        model: Model,
        layout: KVLayout,
        info: ModelInfo,
        budget: MemoryBudget,
        *,
        max_batch_size: int,
        device: Cpu,
        dispatch: Dispatch,
        draft: DraftModel | None = None,
    ) -> None:
        self.info, self.budget = info, budget
        self._model, self._device, self._dispatch = model, device, dispatch
        where = device.torch_device
        self._kv = KVCache(layout, info.num_kv_blocks, where)
        self._rows = InputRows(max_batch_size, layout, where)
        self._sampling = SamplingRows(
            info.vocab_size, info.eos_token_ids, max_batch_size, lambda columns: list(map(device.to_device, columns))
        )
        self._sampler = Sampler(info.vocab_size, where)
        self._recent = RecentTokens(max_batch_size, where)
        self._pooler = Pooler()
        self._scorer = PromptScorer(info.vocab_size, model.logits)
        self._expert_tokens: Tensor | None = None
        self._drafter = None
        if draft is not None:
            self._drafter = Drafter(draft, info.num_kv_blocks, self._rows, self._sampling, self._sampler, device)

    def step(self, plan: StepPlan) -> StepResult:
        """Run a plan. Its rows fail one by one through the result; an exception means that no row was done."""
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Queue a plan's work; return a function that waits for it and returns what `step` does.

        That function queues nothing and may be called on any thread.
        """
        with dispatching(self._dispatch):
            return self._launch(plan).collect

    def _launch(self, plan: StepPlan) -> Launched:
        self._apply(plan)
        batch = self._rows.prepare(plan)
        began = self._device.mark()
        hidden = self._forward(batch)
        self._tell_history(plan, batch)
        failed: dict[int, str] = {}
        prompt_logprobs = self._score_prompts(plan, batch, hidden, failed)
        pooled = _positions_of(self._pooler.rows, batch.rows)
        embeddings = self._pool(plan, batch, pooled, hidden, failed)
        at = np.setdiff1d(np.flatnonzero(batch.samples), pooled) if pooled else np.flatnonzero(batch.samples)
        drafts = [batch.drafts[i] for i in at.tolist()]
        sampled = self._sample(batch, at, drafts, hidden) if len(at) else None
        proposed = self._speculate(plan, batch, at, drafts, sampled) if plan.drafts else None
        experts = self._count_experts()
        done = self._device.mark()
        if sampled is not None and not plan.drafts:
            self._recent.tell(batch.rows[at], sampled.token_ids, done)
        calls = self._dispatch.take()
        return Launched(
            plan, at.tolist(), sampled, drafts, experts, prompt_logprobs, embeddings, failed, calls, proposed,
            began=began, done=done,
        )  # fmt: skip

    def _apply(self, plan: StepPlan) -> None:
        self._recent.begin(plan.step)
        for request_id in plan.dropped:
            self._drop(request_id)
        for admission in plan.admitted:
            self._admit(admission)

    def _forward(self, batch: Input) -> Tensor:
        """Return the hidden states [S, H]."""
        if len(batch.unknown):
            places, rows = (self._device.to_device(column) for column in (batch.unknown, batch.unknown_rows))
            self._recent.fill(batch.attention.token_ids, places, rows)
        return self._model.forward(batch.attention, self._kv)

    def close(self) -> None:
        """Free the model and the pool; the runner is of no use afterwards."""
        del self._model, self._kv, self._scorer, self._sampler, self._rows, self._sampling, self._pooler, self._recent
        self._drafter = None

    def _admit(self, admission: Admission) -> None:
        row = self._rows.admit(admission.request_id)
        self._forget(row)
        if isinstance(admission.params, PoolingParams):
            self._pooler.admit(row, admission, admission.params)
        else:
            self._sampling.admit(row, admission, admission.params)
            self._scorer.admit(row, admission, admission.params)

    def _drop(self, request_id: int) -> None:
        row = self._rows.drop(request_id)
        if row is not None:
            self._forget(row)

    def _forget(self, row: int) -> None:
        self._sampling.forget(row)
        self._pooler.forget(row)
        self._scorer.forget(row)

    def _tell_history(self, plan: StepPlan, batch: Input) -> None:
        """Tell the rows that look back at their output which tokens this step computes.

        A token that the plan did not know is waited for: the one place where a launch waits for the step before.
        """
        for i in _positions_of(self._sampling.history_rows, batch.rows):
            row, offset = int(batch.rows[i]), int(batch.offsets[i])
            token_ids = plan.token_ids[offset : offset + plan.counts[i] - len(batch.drafts[i])]
            if token_ids[0] == UNKNOWN:
                token_ids = (self._recent.on_host(row), *token_ids[1:])
            if token_ids[0] >= 0:  # else the row failed in the step before, and this result is for nobody
                self._sampling.learn(row, plan.starts[i], token_ids)

    def _score_prompts(
        self, plan: StepPlan, batch: Input, hidden: Tensor, failed: dict[int, str]
    ) -> dict[int, tuple[TokenLogprobs | None, ...]] | None:
        scored: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        for i in _positions_of(self._scorer.rows, batch.rows):
            offset = int(batch.offsets[i])
            chunk = hidden[offset : offset + plan.counts[i]]
            entries = self._scorer.score(int(batch.rows[i]), plan.starts[i], chunk)
            if entries:
                scored[plan.request_ids[i]] = entries
            if not is_finite(entries):
                failed[plan.request_ids[i]] = FAILURES[NOT_FINITE]
        return scored or None

    def _pool(
        self, plan: StepPlan, batch: Input, at: list[int], hidden: Tensor, failed: dict[int, str]
    ) -> dict[int, tuple[float, ...]] | None:
        """Feed the pooling rows, which stand at `at` in the batch; return the vectors that are complete."""
        vectors: dict[int, tuple[float, ...]] = {}
        for i in at:
            offset = int(batch.offsets[i])
            vector = self._pooler.add(int(batch.rows[i]), plan.starts[i], hidden[offset : offset + plan.counts[i]])
            if vector is None:
                continue
            if vector.isfinite().all():
                vectors[plan.request_ids[i]] = tuple(vector.tolist())
            else:
                failed[plan.request_ids[i]] = CORRUPTED
        return vectors or None

    def _sample(self, batch: Input, at: NDArray[np.intp], drafts: Sequence[tuple[int, ...]], hidden: Tensor) -> Sampled:
        """Sample after the last known token of the rows that stand at `at`, and after each of their drafts.

        Return it on the host, once it has arrived.
        """
        lasts, positions, rows = batch.lasts[at], batch.ends[at], batch.rows[at]
        if any(drafts):
            counts = np.array([len(draft) for draft in drafts])
            positions = positions - counts
            lasts = np.concatenate(
                [np.arange(last - count, last + 1) for last, count in zip(lasts, counts, strict=True)]
            )
        if len(lasts) < len(hidden):
            hidden = hidden[self._device.to_device(lasts)]
        selected = self._sampling.select(rows, positions, drafts if any(drafts) else None)
        sampled = self._sampler.sample(self._model.logits(hidden), selected)
        if not any(drafts):
            self._recent.keep(self._device.to_device(rows), sampled.token_ids)
        return sampled.to_host(self._device.to_host)

    def _speculate(
        self,
        plan: StepPlan,
        batch: Input,
        at: NDArray[np.intp],
        drafts: Sequence[tuple[int, ...]],
        sampled: Sampled | None,
    ) -> tuple[tuple[int, ...], ...] | None:
        """Wait for what the rows at `at` sampled, tell it to those that look back, and let the draft model go on."""
        self._device.mark().wait()
        tokens = kept_tokens([] if sampled is None else sampled.token_ids.tolist(), drafts)
        kept = {i: row for i, row in zip(at.tolist(), tokens, strict=True) if row[0] >= 0}
        for i in _positions_of(self._sampling.history_rows, batch.rows):
            if i in kept:
                self._sampling.learn(int(batch.rows[i]), int(batch.ends[i]) - len(batch.drafts[i]), kept[i])
        return None if self._drafter is None else self._drafter.propose(plan, batch, kept)

    def _count_experts(self) -> Tensor | None:
        """Return on the host what each expert was given since the last time; a step that raised counts in the next."""
        load = self._model.expert_load()
        if load is None:
            return None
        before, self._expert_tokens = self._expert_tokens, load.sum(0)
        return self._device.to_host(self._expert_tokens if before is None else self._expert_tokens - before)


def _positions_of(wanted: AbstractSet[int], rows: NDArray[np.intp]) -> list[int]:
    """Return where in the batch the wanted rows stand."""
    return [i for i, row in enumerate(rows.tolist()) if row in wanted] if wanted else []
