"""One step on the device: a plan in, one forward over the ragged batch, tokens out.

Steps are launched from one thread only. On a GPU a launch queues the work and returns; the next step may be launched
before the result of this one is read, and finds the sampled tokens on the device. The runner knows rows and tensors;
the scheduler decides what a sequence computes next and which blocks it gets.

A launch that raises may be repeated, whole or in parts, with the same result. Almost all state is set to values in the
plan, so setting it twice changes nothing; `_undo` rolls back counters and histories. Admissions and drops stay: they
hold whether or not the step succeeds.

Letters: B rows of this step, S its tokens, R rows sampled in it, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import CORRUPTED, UNKNOWN, Admission, StepPlan, StepResult, TokenLogprobs
from trio_llm.model.device.device import Capture, Device, fatal_if_lost
from trio_llm.model.loading.draft_model import DraftModel
from trio_llm.model.loading.loader import Model
from trio_llm.model.loading.memory_budget import MemoryBudget
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.model.paged.kv_cache import KVCache, KVLayout
from trio_llm.model.parallel.ranks import Ranks
from trio_llm.model.sampling.acceptance import accepted_tokens
from trio_llm.model.sampling.prompt_logprobs import PromptScorer, is_finite
from trio_llm.model.sampling.row_params import SamplingRows
from trio_llm.model.sampling.sampler import FAILURES, NOT_FINITE, Sampled, Sampler
from trio_llm.model.step.decode_graphs import DecodeGraphs, Outputs, longest_context
from trio_llm.model.step.drafter import Drafter
from trio_llm.model.step.input_rows import InputRows, PlanRows, StepColumns, entries
from trio_llm.model.step.last_tokens import LastTokens
from trio_llm.model.step.pending_step import PendingStep
from trio_llm.model.step.pooling import Pooler
from trio_llm.model_info import ModelInfo, Progress
from trio_llm.params import PoolingParams


class Runner:
    """A model, its KV pool and the rows of the running sequences.

    Attributes:
        info: The model as the engine and the server know it.
        budget: Memory by purpose.
        ranks: The other processes of the model; None if this is the only one.
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
        ranks: Ranks | None = None,
    ) -> None:
        self.info, self.budget, self.ranks = info, budget, ranks
        self._model, self._layout, self._device, self._dispatch = model, layout, device, dispatch
        where = device.torch_device
        self._kv = KVCache(layout, info.num_kv_blocks, where)
        self._last_tokens = LastTokens(max_batch_size, where)
        self._rows = InputRows(max_batch_size, layout, info.max_model_len, device, self._last_tokens)
        self._sampling = SamplingRows(info.vocab_size, info.eos_token_ids, max_batch_size, device.send)
        self._sampler = Sampler(info.vocab_size, where)
        self._pooler = Pooler()
        self._scorer = PromptScorer(info.vocab_size, self._project)
        self._graphs: DecodeGraphs | None = None
        self._drafter = None
        if draft is not None:
            self._drafter = Drafter(
                draft, info.num_kv_blocks, self._rows, self._sampling, self._sampler, device, dispatch
            )  # fmt: skip

    @torch.inference_mode()
    def capture_decodes(self, capture: Capture, report: Callable[[Progress], None] = lambda _: None) -> None:
        """Capture small steps, which `launch` replays from then on."""
        for graphs in self._decode_graphs():
            with self._device.working():
                graphs.capture(capture, self._dispatch, report)

    @torch.inference_mode()
    def record_decodes(self, record: Capture) -> None:
        """Record such steps when a size is first needed."""
        for graphs in self._decode_graphs():
            graphs.record_when_needed(record, self._dispatch)

    def _decode_graphs(self) -> list[DecodeGraphs]:
        """Return graphs of the model and the draft model. They share their logits: only one at a time needs them."""
        longest = longest_context(self.info.kv_groups, self.info.num_kv_blocks, self.info.max_model_len)
        tables, padding_row = self._rows.tables.tables, self._rows.tables.padding_row
        shape = self._rows.num_rows, self.info.vocab_size
        logits = torch.empty(shape, dtype=torch.float32, device=self._device.torch_device)
        self._graphs = DecodeGraphs(self._model, self._kv, self._layout, tables, padding_row, logits, longest)
        return [self._graphs] if self._drafter is None else [self._graphs, self._drafter.decode_graphs(logits, longest)]

    def step(self, plan: StepPlan) -> StepResult:
        """Run a plan. Its rows fail one by one through the result; an exception means that no row was done.

        Raises:
            EngineDeadError: The device is lost; every later step fails too.
        """
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, begun: Callable[[], None] = lambda: None) -> Callable[[], StepResult]:
        """Queue a plan's work; return a function that waits for it and returns, or raises, what `step` does.

        That function queues nothing and may be called on any thread. `begun` is called once the inputs are sent.
        """
        try:
            with fatal_if_lost(self._device), self._device.working(), dispatching(self._dispatch):
                return partial(_collect, self._queue(plan, begun), self._device, self.ranks)
        except Exception:
            self._undo(plan)
            raise

    def _undo(self, plan: StepPlan) -> None:
        """Roll back what a launch that raised did to the rows of its plan and to counters."""
        rows = [self._rows.row_of(request_id) for request_id in plan.request_ids]
        self._sampling.invalidate(row for row in rows if row is not None)
        self._dispatch.take()

    def _queue(self, plan: StepPlan, begun: Callable[[], None]) -> PendingStep:
        self._last_tokens.begin(plan.step)
        for request_id in plan.dropped:
            self._drop(request_id)
        for admission in plan.admitted:
            self._admit(admission)
        rows = self._rows.of(plan)
        pooled = _positions_of(self._pooler.rows, rows.index)
        scored = _positions_of(self._scorer.rows, rows.index)
        scored = [i for i in scored if self._scorer.wants(int(rows.index[i]), plan.starts[i])]
        at = np.setdiff1d(rows.sampled, pooled) if pooled else rows.sampled
        began, loads = self._device.mark(), self._model.expert_load()
        failed: dict[int, str] = {}
        prompt_logprobs = embeddings = None
        size = None if pooled or scored else self._graph_size(rows)
        if size is None:
            hidden, sent = self._forward(rows, at, begun)
            prompt_logprobs = self._score_prompts(plan, rows, scored, hidden, failed)
            embeddings = self._pool(plan, rows, pooled, hidden, failed)
            outputs = Outputs(self._logits(hidden, sent), None) if len(at) else None
        else:
            outputs, sent = self._replay(rows, at, size, begun)
        self._update_histories(plan, rows)
        drafts = [rows.drafts[i] for i in at.tolist()] if plan.drafts else ()
        sampled = None if outputs is None else self._sample(rows, at, drafts, outputs, sent)
        proposed = self._speculate(plan, rows, at, drafts, sampled) if plan.drafts else None
        experts = self._expert_tokens_since(loads)
        done = self._device.mark()
        if sampled is not None and not plan.drafts and self._sampling.history_rows:
            sampling = rows.index[at]
            looking_back = {int(sampling[i]): i for i in _positions_of(self._sampling.history_rows, sampling)}
            self._last_tokens.keep_for_host(looking_back, sampled.token_ids, done)
        calls = self._dispatch.take()
        return PendingStep(
            plan, at.tolist(), sampled, drafts, experts, prompt_logprobs, embeddings, failed, calls, proposed,
            began=began, done=done,
        )  # fmt: skip

    def drop_all(self) -> None:
        """Drop the sequences of a scheduler that is no more."""
        for request_id in self._rows.request_ids():
            self._drop(request_id)

    def close(self) -> None:
        """Free the model, its graphs and the pool; the runner is of no use afterwards."""
        del self._graphs, self._model, self._kv, self._scorer, self._sampler, self._rows
        del self._sampling, self._pooler, self._last_tokens, self._drafter
        if self.ranks is not None:
            self.ranks.close()
        self._device.release()

    def _graph_size(self, rows: PlanRows) -> int | None:
        """Return the size of the graph for the tokens of these rows; None if there is none."""
        if self._graphs is None:
            return None
        return self._graphs.size_for(len(rows.token_ids), is_mixed=rows.is_mixed)

    def _replay(
        self, rows: PlanRows, at: NDArray[np.intp], size: int, begun: Callable[[], None]
    ) -> tuple[Outputs, StepColumns]:
        """Replay a graph; return what to sample from, of R rows."""
        assert self._graphs is not None
        decodes, sent = self._rows.send_decodes(rows, at, size)
        begun()
        with nullcontext() if self.ranks is None else self.ranks.decodes(decodes, rows.additions):
            outputs = self._graphs.replay(decodes, self._dispatch)
        if sent.sampled_from is not None:
            return outputs.of(sent.sampled_from), sent
        return outputs if size == len(rows.token_ids) else outputs.of_first(len(rows.token_ids)), sent

    def _forward(self, rows: PlanRows, at: NDArray[np.intp], begun: Callable[[], None]) -> tuple[Tensor, StepColumns]:
        """Return the hidden states [S, H]."""
        batch, sent = self._rows.send(rows, at)
        begun()
        ranks = nullcontext()
        if self.ranks is not None:
            ranks = self.ranks.forward(rows.index, rows.starts, rows.counts, rows.additions, batch.token_ids)
        with ranks:
            return self._model.forward(batch, self._kv), sent

    def _logits(self, hidden: Tensor, sent: StepColumns) -> Tensor:
        """Return the logits [R, V] to sample from."""
        return self._project(hidden if sent.sampled_from is None else hidden.index_select(0, sent.sampled_from))

    def _project(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, V] of hidden states [R, H]."""
        with nullcontext() if self.ranks is None else self.ranks.logits(hidden):
            return self._model.logits(hidden)

    def _admit(self, admission: Admission) -> None:
        row = self._rows.admit(admission.request_id)
        self._forget(row)
        if isinstance(admission.params, PoolingParams):
            self._pooler.admit(row, admission, admission.params)
        else:
            self._sampling.admit(row, admission, admission.params)
            self._scorer.admit(row, admission, admission.params)

    def _drop(self, request_id: int) -> None:
        row = self._rows.row_of(request_id)
        if row is not None:
            self._forget(row)
            self._rows.drop(request_id)

    def _forget(self, row: int) -> None:
        self._sampling.forget(row)
        self._pooler.forget(row)
        self._scorer.forget(row)

    def _update_histories(self, plan: StepPlan, rows: PlanRows) -> None:
        """Give rows that depend on their output the tokens that this step computes.

        This waits for tokens that are unknown in the plan: the only time that a launch waits for the step before.
        """
        for i in _positions_of(self._sampling.history_rows, rows.index):
            row, offset = int(rows.index[i]), int(rows.offsets[i])
            token_ids = plan.token_ids[offset : offset + plan.counts[i] - len(rows.drafts[i])]
            if token_ids[0] == UNKNOWN:
                token_ids = (self._last_tokens.on_host(row), *token_ids[1:])
            if token_ids[0] >= 0:  # else the row failed in the step before, and its result is discarded
                self._sampling.set_tokens(row, plan.starts[i], token_ids)

    def _score_prompts(
        self, plan: StepPlan, rows: PlanRows, at: list[int], hidden: Tensor, failed: dict[int, str]
    ) -> dict[int, tuple[TokenLogprobs | None, ...]] | None:
        """Compute the prompt log-probabilities of the rows at `at`."""
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
        """Pool the hidden states of the rows at `at`; return the complete vectors."""
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
        self,
        rows: PlanRows,
        at: NDArray[np.intp],
        drafts: Sequence[tuple[int, ...]],
        outputs: Outputs,
        sent: StepColumns,
    ) -> Sampled:
        """Sample for the rows at `at`; the result's tensors are on the host, valid after the next mark."""
        speculates = any(drafts)
        positions = entries(rows.ends, at)
        if speculates:
            positions = positions - [len(draft) for draft in drafts]
        index = entries(rows.index, at)
        selected = self._sampling.select(index, positions, drafts if speculates else None)
        sampled = self._sampler.sample(outputs.logits, selected, outputs.likeliest)
        if not speculates:
            self._last_tokens.keep(index, sent.sampled_rows, sampled.token_ids)
        return sampled.to_host(self._device.to_host)

    def _speculate(
        self,
        plan: StepPlan,
        rows: PlanRows,
        at: NDArray[np.intp],
        drafts: Sequence[tuple[int, ...]],
        sampled: Sampled | None,
    ) -> tuple[tuple[int, ...], ...] | None:
        """Wait for the sampled tokens, update the histories with the accepted ones, and let the draft model propose."""
        self._device.mark().wait()
        tokens = accepted_tokens([] if sampled is None else sampled.token_ids.tolist(), drafts)
        accepted = {i: row for i, row in zip(at.tolist(), tokens, strict=True) if row[0] >= 0}
        for i in _positions_of(self._sampling.history_rows, rows.index):
            if i in accepted:
                self._sampling.set_tokens(int(rows.index[i]), int(rows.ends[i]) - len(rows.drafts[i]), accepted[i])
        return None if self._drafter is None else self._drafter.propose(plan, rows, accepted)

    def _expert_tokens_since(self, before: Tensor | None) -> Tensor | None:
        """Return on the host how many tokens each expert received since its load was `before`; None without experts."""
        after = self._model.expert_load()
        return None if before is None or after is None else self._device.to_host((after - before).sum(0))


def _collect(launched: PendingStep, device: Device, ranks: Ranks | None) -> StepResult:
    with fatal_if_lost(device):
        launched.done.wait()
        if ranks is not None:
            ranks.check()
        return launched.collect()


def _positions_of(wanted: AbstractSet[int], rows: NDArray[np.intp]) -> list[int]:
    """Return the indices in the batch of the wanted rows."""
    return [i for i, row in enumerate(rows.tolist()) if row in wanted] if wanted else []
