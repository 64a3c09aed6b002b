"""One step on the device: plan in, one forward over the ragged batch, tokens out.

Synchronous, and called from one thread only. It knows rows and tensors; what a sequence wants next, and where
its blocks come from, is decided elsewhere. Applying a plan sets values that depend on the plan alone, so a failed step
may be run again, whole or in parts.

Letters: B rows of this step, S its tokens, R rows sampled in it, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from operator import sub
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import Admission, ModelInfo, PoolingParams, StepPlan, StepResult, TokenLogprobs
from trio_llm.model.input_batch import Input, InputRows
from trio_llm.model.kv_cache import KVCache, KVLayout
from trio_llm.model.loader import Model
from trio_llm.model.memory import MemoryBudget
from trio_llm.model.pooling import Pooler
from trio_llm.model.prompt_logprobs import PromptScorer, is_finite
from trio_llm.model.sampler import FAILURES, NOT_FINITE, Sampler
from trio_llm.model.sampling_rows import SamplingRows

_Logprobs = tuple[tuple[TokenLogprobs, ...] | None, ...]


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
        device: torch.device,
    ) -> None:
        self.info, self.budget = info, budget
        self._model = model
        self._kv = KVCache(layout, info.num_kv_blocks, device)
        self._device = device
        self._rows = InputRows(max_batch_size, layout, device)
        self._sampling = SamplingRows(info.vocab_size, info.eos_token_ids, max_batch_size, device)
        self._sampler = Sampler(info.vocab_size, device)
        self._pooler = Pooler()
        self._scorer = PromptScorer(info.vocab_size, model.logits)
        self._expert_tokens = _expert_tokens(model)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Run a plan. Its rows fail one by one through the result; an exception means that no row was done."""
        for request_id in plan.dropped:
            self._drop(request_id)
        for admission in plan.admitted:
            self._admit(admission)
        batch = self._rows.prepare(plan)
        self._tell_history(plan, batch)
        began = perf_counter()
        hidden = self._model.forward(batch.attention, self._kv)
        failed: dict[int, str] = {}
        prompt_logprobs = self._score_prompts(plan, batch, hidden, failed)
        pooled = _positions_of(self._pooler.rows, batch.rows)
        embeddings = self._pool(plan, batch, pooled, hidden, failed)
        sampled = np.setdiff1d(np.flatnonzero(batch.samples), pooled) if pooled else np.flatnonzero(batch.samples)
        token_ids, logprobs = self._sample(plan, batch, sampled, hidden, failed)
        seconds = perf_counter() - began
        experts = self._count_experts()
        return StepResult(plan.step, token_ids, logprobs, prompt_logprobs, embeddings, failed, seconds, experts)

    def close(self) -> None:
        """Free the model and the pool; the runner is of no use afterwards."""
        del self._model, self._kv, self._scorer, self._sampler, self._rows, self._sampling, self._pooler

    def _count_experts(self) -> tuple[int, ...] | None:
        """Return what each expert was given since the last time; a step that raised counts in the next."""
        before, self._expert_tokens = self._expert_tokens, _expert_tokens(self._model)
        return tuple(map(sub, self._expert_tokens, before)) or None

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
        """Tell the rows that look back at their output which tokens this step computes."""
        for i in _positions_of(self._sampling.history_rows, batch.rows):
            offset = int(batch.offsets[i])
            self._sampling.learn(int(batch.rows[i]), plan.starts[i], plan.token_ids[offset : offset + plan.counts[i]])

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
                failed[plan.request_ids[i]] = "The model produced hidden states that are not finite."
        return vectors or None

    def _sample(
        self, plan: StepPlan, batch: Input, at: NDArray[np.intp], hidden: Tensor, failed: dict[int, str]
    ) -> tuple[tuple[tuple[int, ...], ...], _Logprobs | None]:
        """Sample after the last token of the rows that stand at `at`; return the result's columns."""
        if not len(at):
            return ((),) * len(batch.rows), None
        if len(at) < len(hidden):
            hidden = hidden[torch.from_numpy(batch.lasts[at]).to(self._device, non_blocking=True)]
        selected = self._sampling.select(batch.rows[at], batch.ends[at])
        sampled = self._sampler.sample(self._model.logits(hidden), selected)
        token_ids: list[tuple[int, ...]] = [()] * len(batch.rows)
        for i, token_id in zip(at.tolist(), sampled.token_ids.tolist(), strict=True):
            if token_id >= 0:
                token_ids[i] = (token_id,)
            else:
                failed[plan.request_ids[i]] = FAILURES[token_id]
        entries = sampled.logprobs()
        if entries is None:
            return tuple(token_ids), None
        logprobs: list[tuple[TokenLogprobs, ...] | None] = [None] * len(batch.rows)
        for i, entry in zip(at.tolist(), entries, strict=True):
            logprobs[i] = None if entry is None else (entry,)
        return tuple(token_ids), tuple(logprobs)


def _expert_tokens(model: Model) -> list[int]:
    """Return what each expert was given so far, over all layers; nothing without experts."""
    load = model.expert_load()
    return [] if load is None else load.sum(0).tolist()


def _positions_of(wanted: AbstractSet[int], rows: NDArray[np.intp]) -> list[int]:
    """Return where in the batch the wanted rows stand."""
    return [i for i, row in enumerate(rows.tolist()) if row in wanted] if wanted else []
