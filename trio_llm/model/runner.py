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
from functools import partial

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
    Progress,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from trio_llm.model.decode_graphs import DecodeGraphs
from trio_llm.model.device import Capture, Device, fatal_if_lost
from trio_llm.model.dispatch import Dispatch, dispatching
from trio_llm.model.draft_model import DraftModel
from trio_llm.model.drafter import Drafter
from trio_llm.model.input_batch import InputRows, PlanRows, Sent
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
        device: Device,
        dispatch: Dispatch,
        draft: DraftModel | None = None,
    ) -> None:
        self.info, self.budget = info, budget
        self._model, self._layout, self._device, self._dispatch = model, layout, device, dispatch
        where = device.torch_device
        self._kv = KVCache(layout, info.num_kv_blocks, where)
        self._recent = RecentTokens(max_batch_size, where)
        self._rows = InputRows(max_batch_size, layout, info.max_model_len, device, self._recent)
        self._sampling = SamplingRows(info.vocab_size, info.eos_token_ids, max_batch_size, device.send)
        self._sampler = Sampler(info.vocab_size, where)
        self._pooler = Pooler()
        self._scorer = PromptScorer(info.vocab_size, model.logits)
        self._expert_tokens: Tensor | None = None
        self._graphs: DecodeGraphs | None = None
        self._drafter = None
        if draft is not None:
            self._drafter = Drafter(draft, info.num_kv_blocks, self._rows, self._sampling, self._sampler, device)

    @torch.inference_mode()
    def capture_decodes(self, capture: Capture, report: Callable[[Progress], None] = lambda _: None) -> None:
        """Capture steps of one token per row, which `launch` replays from then on."""
        sizes = [group.block_size for group in self.info.kv_groups if group.window is None]
        longest = min([self.info.max_model_len, *(self.info.num_kv_blocks * size for size in sizes)])
        rows, tables = self._rows.num_rows, self._rows.tables
        self._graphs = DecodeGraphs(self._model, self._kv, self._layout, tables, rows, longest)
        with self._device.working():
            self._graphs.capture(capture, self._dispatch.mode, report)

    def step(self, plan: StepPlan) -> StepResult:
        """Run a plan. Its rows fail one by one through the result; an exception means that no row was done.

        Raises:
            EngineDeadError: The device is lost, and so is every step after this one.
        """
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Queue a plan's work; return a function that waits for it and returns, or raises, what `step` does.

        That function queues nothing and may be called on any thread.
        """
        with fatal_if_lost(self._device), self._device.working(), dispatching(self._dispatch):
            return partial(_collect, self._queue(plan), self._device)

    def _queue(self, plan: StepPlan) -> Launched:
        self._recent.begin(plan.step)
        for request_id in plan.dropped:
            self._drop(request_id)
        for admission in plan.admitted:
            self._admit(admission)
        rows = self._rows.of(plan)
        pooled = _positions_of(self._pooler.rows, rows.index)
        scored = [i for i, row in enumerate(rows.index.tolist()) if self._scorer.wants(row, plan.starts[i])]
        at = np.setdiff1d(np.flatnonzero(rows.samples), pooled) if pooled else np.flatnonzero(rows.samples)
        began = self._device.mark()
        failed: dict[int, str] = {}
        prompt_logprobs = embeddings = None
        size = None if pooled or scored else self._graph_size(rows)
        if size is None:
            hidden, sent = self._forward(rows, at)
            prompt_logprobs = self._score_prompts(plan, rows, scored, hidden, failed)
            embeddings = self._pool(plan, rows, pooled, hidden, failed)
            logits = self._logits(hidden, sent) if len(at) else None
        else:
            logits, sent = self._replay(rows, at, size)
        self._tell_history(plan, rows)
        drafts = [rows.drafts[i] for i in at.tolist()]
        sampled = None if logits is None else self._sample(rows, at, drafts, logits, sent)
        proposed = self._speculate(plan, rows, at, drafts, sampled) if plan.drafts else None
        experts = self._count_experts()
        done = self._device.mark()
        if sampled is not None and not plan.drafts:
            self._recent.tell(rows.index[at], sampled.token_ids, done)
        calls = self._dispatch.take()
        return Launched(
            plan, at.tolist(), sampled, drafts, experts, prompt_logprobs, embeddings, failed, calls, proposed,
            began=began, done=done,
        )  # fmt: skip

    def close(self) -> None:
        """Free the model, its graphs and the pool; the runner is of no use afterwards."""
        del self._graphs, self._model, self._kv, self._scorer, self._sampler, self._rows
        del self._sampling, self._pooler, self._recent, self._expert_tokens, self._drafter
        self._device.release()

    def _graph_size(self, rows: PlanRows) -> int | None:
        """Return the size of the graph that these rows fit in; None where they do not all compute one token."""
        if self._graphs is None or len(rows.index) < len(rows.token_ids):
            return None
        return self._graphs.size_for(len(rows.index))

    def _replay(self, rows: PlanRows, at: NDArray[np.intp], size: int) -> tuple[Tensor, Sent]:
        """Return the logits [R, V] of the rows that stand at `at`, out of a graph."""
        assert self._graphs is not None
        decodes, sent = self._rows.send_decodes(rows, at, size)
        logits = self._graphs.replay(decodes, self._dispatch)
        return logits[: len(at)] if len(at) == len(rows.index) else logits.index_select(0, sent.sampled_from), sent

    def _forward(self, rows: PlanRows, at: NDArray[np.intp]) -> tuple[Tensor, Sent]:
        """Return the hidden states [S, H]."""
        batch, sent = self._rows.send(rows, at)
        return self._model.forward(batch, self._kv), sent

    def _logits(self, hidden: Tensor, sent: Sent) -> Tensor:
        """Return the logits [R, V] of what is sampled from."""
        whole = len(sent.sampled_from) == len(hidden)
        return self._model.logits(hidden if whole else hidden.index_select(0, sent.sampled_from))

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

    def _tell_history(self, plan: StepPlan, rows: PlanRows) -> None:
        """Tell the rows that look back at their output which tokens this step computes.

        A token that the plan did not know is waited for: the one place where a launch waits for the step before.
        """
        for i in _positions_of(self._sampling.history_rows, rows.index):
            row, offset = int(rows.index[i]), int(rows.offsets[i])
            token_ids = plan.token_ids[offset : offset + plan.counts[i] - len(rows.drafts[i])]
            if token_ids[0] == UNKNOWN:
                token_ids = (self._recent.on_host(row), *token_ids[1:])
            if token_ids[0] >= 0:  # else the row failed in the step before, and this result is for nobody
                self._sampling.learn(row, plan.starts[i], token_ids)

    def _score_prompts(
        self, plan: StepPlan, rows: PlanRows, at: list[int], hidden: Tensor, failed: dict[int, str]
    ) -> dict[int, tuple[TokenLogprobs | None, ...]] | None:
        """Score the prompts of the rows that stand at `at`."""
        scored: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        for i in at:
            chunk = hidden[rows.offsets[i] : rows.lasts[i] + 1]
            entries = self._scorer.score(int(rows.index[i]), plan.starts[i], chunk)
            if entries:
                scored[plan.request_ids[i]] = entries
            if not is_finite(entries):
                failed[plan.request_ids[i]] = FAILURES[NOT_FINITE]
        return scored or None

    def _pool(
        self, plan: StepPlan, rows: PlanRows, at: list[int], hidden: Tensor, failed: dict[int, str]
    ) -> dict[int, tuple[float, ...]] | None:
        """Feed the pooling rows, which stand at `at` in the batch; return the vectors that are complete."""
        vectors: dict[int, tuple[float, ...]] = {}
        for i in at:
            chunk = hidden[rows.offsets[i] : rows.lasts[i] + 1]
            vector = self._pooler.add(int(rows.index[i]), plan.starts[i], chunk)
            if vector is None:
                continue
            if vector.isfinite().all():
                vectors[plan.request_ids[i]] = tuple(vector.tolist())
            else:
                failed[plan.request_ids[i]] = CORRUPTED
        return vectors or None

    def _sample(
        self, rows: PlanRows, at: NDArray[np.intp], drafts: Sequence[tuple[int, ...]], logits: Tensor, sent: Sent
    ) -> Sampled:
        """Sample for the rows that stand at `at`; return it on the host, once it has arrived."""
        speculates = any(drafts)
        positions = rows.ends[at] - [len(draft) for draft in drafts] if speculates else rows.ends[at]
        selected = self._sampling.select(rows.index[at], positions, drafts if speculates else None)
        sampled = self._sampler.sample(logits, selected)
        if not speculates:
            self._recent.keep(sent.sampled_rows, sampled.token_ids)
        return sampled.to_host(self._device.to_host)

    def _speculate(
        self,
        plan: StepPlan,
        rows: PlanRows,
        at: NDArray[np.intp],
        drafts: Sequence[tuple[int, ...]],
        sampled: Sampled | None,
    ) -> tuple[tuple[int, ...], ...] | None:
        """Wait for what the rows at `at` sampled, tell it to those that look back, and let the draft model go on."""
        self._device.mark().wait()
        tokens = kept_tokens([] if sampled is None else sampled.token_ids.tolist(), drafts)
        kept = {i: row for i, row in zip(at.tolist(), tokens, strict=True) if row[0] >= 0}
        for i in _positions_of(self._sampling.history_rows, rows.index):
            if i in kept:
                self._sampling.learn(int(rows.index[i]), int(rows.ends[i]) - len(rows.drafts[i]), kept[i])
        return None if self._drafter is None else self._drafter.propose(plan, rows, kept)

    def _count_experts(self) -> Tensor | None:
        """Return on the host what each expert was given since the last time; a step that raised counts in the next."""
        load = self._model.expert_load()
        if load is None:
            return None
        before, self._expert_tokens = self._expert_tokens, load.sum(0)
        return self._device.to_host(self._expert_tokens if before is None else self._expert_tokens - before)


def _collect(launched: Launched, device: Device) -> StepResult:
    with fatal_if_lost(device):
        return launched.collect()


def _positions_of(wanted: AbstractSet[int], rows: NDArray[np.intp]) -> list[int]:
    """Return where in the batch the wanted rows stand."""
    return [i for i, row in enumerate(rows.tolist()) if row in wanted] if wanted else []
