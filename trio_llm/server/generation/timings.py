"""Times and progress of a request, under llama.cpp's names."""

from __future__ import annotations

from collections.abc import Sequence

import trio
from msgspec import UNSET

from trio_llm.engine import Stream
from trio_llm.server.answers.base import TokenUsage
from trio_llm.server.answers.requests import PromptProgress, Timings


def timings(streams: Sequence[Stream], usage: TokenUsage) -> Timings:
    """Return tokens and times so far: from the first of the streams to begin to the last to end."""
    times = [stream.times for stream in streams]
    started = [one.started_s for one in times if one.started_s is not None]
    first = [one.first_token_s for one in times if one.first_token_s is not None]
    last = [one.last_token_s for one in times if one.last_token_s is not None]
    prompt_ms = 1000 * (max(first) - min(started)) if first and started else 0.0
    predicted_ms = 1000 * (max(last) - min(first)) if first else 0.0
    cached = usage.prompt_tokens_details.cached_tokens
    prompt_n, predicted_n = usage.prompt_tokens - cached, usage.completion_tokens
    drafts = sum(one.num_drafts for one in times)
    return Timings(
        cache_n=cached,
        prompt_n=prompt_n,
        prompt_ms=round(prompt_ms, 3),
        prompt_per_token_ms=_ratio(prompt_ms, prompt_n),
        prompt_per_second=_ratio(1000 * prompt_n, prompt_ms),
        predicted_n=predicted_n,
        predicted_ms=round(predicted_ms, 3),
        predicted_per_token_ms=_ratio(predicted_ms, predicted_n),
        predicted_per_second=_ratio(1000 * predicted_n, predicted_ms),
        draft_n=drafts or UNSET,
        draft_n_accepted=sum(one.num_accepted_drafts for one in times) if drafts else UNSET,
    )


def prompt_progress(stream: Stream, num_tokens: int) -> PromptProgress:
    """Return how far a stream's prompt is, with `num_tokens` done."""
    started_s = stream.times.started_s
    return PromptProgress(
        total=len(stream.prompt_token_ids),
        cache=stream.cached_tokens,
        processed=num_tokens,
        time_ms=0.0 if started_s is None else round(1000 * (trio.current_time() - started_s), 3),
    )


def _ratio(number: float, of: float) -> float | None:
    return round(number / of, 3) if of else None
