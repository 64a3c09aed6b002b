"""Answers about requests: where their time went, and how far they are."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from trio_llm.server.answers.base import Answer


class Timings(Answer, kw_only=True):
    """Tokens and times of a request, under llama.cpp's names. A rate is null where no time passed.

    Attributes:
        cache_n: Prompt tokens from the prefix cache.
        prompt_n: Prompt tokens that were computed.
        prompt_ms: Time from its first step to its first token.
        prompt_per_token_ms: The same per computed prompt token.
        prompt_per_second: Computed prompt tokens per second.
        predicted_n: Generated tokens.
        predicted_ms: Time from the first token to the last.
        predicted_per_token_ms: The same per generated token.
        predicted_per_second: Generated tokens per second.
        draft_n: Drafts that were verified; absent if there were none.
        draft_n_accepted: Drafts that were accepted; absent if there were none.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float | None
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float | None
    predicted_per_second: float | None
    draft_n: int | UnsetType = UNSET
    draft_n_accepted: int | UnsetType = UNSET


class PromptProgress(Answer, kw_only=True):
    """How far the prompt is, under llama.cpp's names.

    Attributes:
        total: Tokens of the prompt.
        cache: Those from the prefix cache.
        processed: Those that are done, the cached ones included.
        time_ms: Time since its first step.
    """

    total: int
    cache: int
    processed: int
    time_ms: float


class Neighbour(Answer, kw_only=True):
    """Requests beside this one.

    Attributes:
        id: Id of the answer if it is your own request; null for those of other keys, together.
        requests: How many requests they are.
        blocks: Blocks of the KV cache that they held.
        tokens: Tokens that they computed in the step.
    """

    id: str | None
    requests: int
    blocks: int
    tokens: int


class RequestWait(Answer, kw_only=True):
    """Consecutive steps in which the request waited for the same reason.

    Attributes:
        reason: "blocks": not enough blocks were free. "order": a request before it waited for blocks. "budget": others
            used up the tokens of the step. "batch": as many requests ran as may. "leader": another sample of its prompt
            computed it first.
        first_step: The first of these steps.
        last_step: The last one.
        ms: How long they took.
        free_blocks: Free blocks of the KV cache, in the last of these steps.
        neighbours: The requests that ran, in the last of these steps.
    """

    reason: Literal["blocks", "order", "budget", "batch", "leader"]
    first_step: int
    last_step: int
    ms: float
    free_blocks: int
    neighbours: list[Neighbour]


class RequestChunk(Answer, kw_only=True):
    """A part of the prompt that one step computed.

    Attributes:
        step: Number of the step.
        first: Position of its first token.
        tokens: Number of its tokens.
        ms: Time of the step; null while it runs.
        again: It begins before what was computed already, because of a preemption.
        neighbours: The other requests of the step.
    """

    step: int
    first: int
    tokens: int
    ms: float | None
    again: bool
    neighbours: list[Neighbour]


class CacheDifference(Answer, kw_only=True):
    """Where the prompt leaves what was cached when it started.

    Attributes:
        position: The first token that differs.
        text: The prompt from there on, some tokens.
        cached_text: What was cached instead; only on a server with API keys, where it is your own.
    """

    position: int
    text: str
    cached_text: str | UnsetType = UNSET


class ExplainedSample(Answer, kw_only=True):
    """Where the time of one sample went. A time is null if it did not get that far.

    Attributes:
        index: Which sample: those of the first prompt come first.
        state: "waiting", "running" or "ended".
        reason: Why it ended; "error" if it failed.
        complete: Whether all its steps are remembered.
        prompt_tokens: Tokens of its prompt.
        cached_tokens: Those from the prefix cache.
        needed_blocks: Blocks of the KV cache for its prompt.
        difference: Where its prompt leaves a cached one; null if no other goes on after the cached part.
        total_ms: Time from its arrival to its end, or to now.
        queue_ms: Time from its arrival to its first step.
        prefill_ms: Time from its first step to its first token.
        decode_ms: Time from its first token to its last.
        waits: The first 256 waits.
        chunks: The first 256 parts of the prompt.
        preempted_steps: The steps that took its blocks.
        decode_steps: Steps that computed its generated tokens.
        drafts: Drafts of its tokens that were verified.
        accepted: Drafts that were accepted; null until it ended.
    """

    index: int
    state: Literal["waiting", "running", "ended"]
    reason: str | None
    complete: bool
    prompt_tokens: int
    cached_tokens: int
    needed_blocks: int
    difference: CacheDifference | None
    total_ms: float
    queue_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None
    waits: list[RequestWait]
    chunks: list[RequestChunk]
    preempted_steps: list[int]
    decode_steps: int
    drafts: int
    accepted: int | None


class ExplainedRequest(Answer, kw_only=True):
    """Why a request took as long as it did.

    Attributes:
        id: Id of the answer.
        object: Type of the object.
        samples: One entry per sample that is remembered.
    """

    id: str
    object: Literal["request.explanation"] = "request.explanation"
    samples: list[ExplainedSample]


class CancelledRequest(Answer, kw_only=True):
    """A request that was told to end.

    Attributes:
        id: Id of the answer.
        object: Type of the object.
        cancelled: Whether any sample was still running.
    """

    id: str
    object: Literal["request.cancelled"] = "request.cancelled"
    cancelled: bool
