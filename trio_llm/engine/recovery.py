"""Bisects a step that raises until the request that causes it is alone; only that one fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import attrs

from trio_llm.errors import EngineDeadError
from trio_llm.messages import StepPlan, StepResult, TokenLogprobs

K = TypeVar("K")
V = TypeVar("V")
Collect = Callable[[], StepResult]
Launch = Callable[[StepPlan], Collect]
_log = logging.getLogger(__name__)


def launch_step(plan: StepPlan, launch: Launch) -> Collect:
    """Launch a plan, and bisect it if that raises. Costs log2(rows) extra steps per failing request.

    On return all parts have been launched, so later plans may depend on them. A runner that cannot continue (a sticky
    CUDA error) raises EngineDeadError, which is raised from here, like everything that is not an Exception.
    """
    try:
        return launch(plan)
    except EngineDeadError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the model raises concerns its rows only
        if len(plan.request_ids) <= 1:
            failed = _all_failed(plan, error)
            return lambda: failed
        _log.warning(
            "step %d failed; running the halves of its %d rows", plan.step, len(plan.request_ids), exc_info=error
        )
        middle = len(plan.request_ids) // 2
        halves = [launch_step(part, launch) for part in (_rows(plan, 0, middle), _rows(plan, middle, None))]
        return lambda: _joined(plan, [collect() for collect in halves])


def _rows(plan: StepPlan, first: int, end: int | None) -> StepPlan:
    """Cut a plan to some of its rows, with the admissions that they need.

    Plans are idempotent, so the failed step may already have applied a part. A sequence that is dropped and admitted
    again in one plan is dropped only in the part that has its row.
    """
    ids = plan.request_ids[first:end]
    elsewhere = set(plan.request_ids) - set(ids)
    tokens_before = sum(plan.counts[:first])
    counts = plan.counts[first:end]
    return attrs.evolve(
        plan,
        dropped=tuple(request_id for request_id in plan.dropped if request_id not in elsewhere),
        admitted=tuple(admission for admission in plan.admitted if admission.request_id not in elsewhere),
        request_ids=ids,
        starts=plan.starts[first:end],
        counts=counts,
        token_ids=plan.token_ids[tokens_before : tokens_before + sum(counts)],
        samples=plan.samples[first:end],
        new_blocks=plan.new_blocks[first:end],
        drafts=plan.drafts[first:end],
        draft_limits=plan.draft_limits[first:end],
    )


def _all_failed(plan: StepPlan, error: Exception) -> StepResult:
    _log.error("requests %s failed in the model in step %d", plan.request_ids, plan.step, exc_info=error)
    # The exception's text may contain paths and addresses: it goes to the log, only its type to the client.
    why = f"The model failed on this request ({type(error).__name__})."
    return StepResult(plan.step, tuple(() for _ in plan.request_ids), failed=dict.fromkeys(plan.request_ids, why))


def _joined(plan: StepPlan, parts: Sequence[StepResult]) -> StepResult:
    logprobs: list[tuple[TokenLogprobs, ...] | None] = []
    for part in parts:
        logprobs.extend(part.logprobs if part.logprobs is not None else (None,) * len(part.token_ids))
    return StepResult(
        plan.step,
        tuple(row for part in parts for row in part.token_ids),
        logprobs=tuple(logprobs) if any(row is not None for row in logprobs) else None,
        prompt_logprobs=_merged(part.prompt_logprobs for part in parts),
        embeddings=_merged(part.embeddings for part in parts),
        failed=_merged(part.failed for part in parts) or {},
        seconds=sum(part.seconds for part in parts),
        expert_tokens=_summed(part.expert_tokens for part in parts),
        kernel_calls=tuple(call for part in parts for call in part.kernel_calls or ()) or None,
        drafts=_drafts(parts) if plan.draft_limits else None,
    )


def _drafts(parts: Sequence[StepResult]) -> tuple[tuple[int, ...], ...]:
    """Return a draft model's drafts for all rows, none for rows that failed."""
    return tuple(row for part in parts for row in part.drafts or ((),) * len(part.token_ids))


def _summed(columns: Iterable[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    counted = [column for column in columns if column is not None]
    return tuple(map(sum, zip(*counted, strict=True))) or None


def _merged(parts: Iterable[Mapping[K, V] | None]) -> dict[K, V] | None:
    merged = {key: value for part in parts if part for key, value in part.items()}
    return merged or None
