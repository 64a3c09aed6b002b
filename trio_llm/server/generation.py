"""What chat and completions share: submitting, counting, and answering whole or as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, cast

import attrs
from quart import Response, g, request

import trio_llm
from trio_llm.engine import Delta, Stream
from trio_llm.messages import SamplingParams
from trio_llm.server import sse
from trio_llm.server.body import current_config, warn
from trio_llm.server.deadline import Deadline
from trio_llm.server.edge import LIFETIME, Lifetime
from trio_llm.server.requests import CompletionBody, GenerationBody
from trio_llm.server.services import Services

FINGERPRINT = f"trio-llm-{trio_llm.__version__}"


@attrs.frozen
class Head:
    """What is the same in every chunk of an answer. The id is for clients alone: nothing here is found by it."""

    id: str
    created: int
    model: str

    @classmethod
    def make(cls, prefix: str, model: str, request_id: str | None = None) -> Head:
        return cls(f"{prefix}-{request_id or secrets.token_hex(12)}", int(time.time()), model)

    def chunk(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the frame of an answer or chunk."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": list(choices),
        }


@attrs.frozen(kw_only=True)
class Caller:
    """Who asks, apart from what: an HTTP request, or a line of a batch.

    Attributes:
        lifetime: Streams opened for the caller end with it.
        key_id: Its API key, None without one.
        warn: Tells it something beside the answer; plain characters only.
        background: Its requests wait behind everybody else's.
        deadline: When it must have its answer.
        keep_alive_s: How long its stream may be silent; 0 for ever.
    """

    lifetime: Lifetime
    key_id: str | None
    warn: Callable[[str], None]
    background: bool = False
    deadline: Deadline = attrs.field(factory=Deadline)
    keep_alive_s: float = 0.0

    @classmethod
    def current(cls) -> Caller:
        """Return the caller of the current HTTP request."""
        lifetime: Lifetime = cast(Any, request.scope)[LIFETIME]
        config = current_config()
        return cls(
            lifetime=lifetime,
            key_id=g.get("key_id"),
            warn=warn,
            deadline=Deadline.after(lifetime.began_s, config.limits.request_timeout_s),
            keep_alive_s=config.server.sse_keep_alive_interval,
        )


class UsageCounter:
    """Counts tokens over the samples of all prompts; a prompt counts once, however many samples it has."""

    def __init__(self, streams: Sequence[Stream], samples_per_prompt: int) -> None:
        self._firsts = streams[::samples_per_prompt]
        self._completion_tokens = [0] * len(streams)

    def add(self, index: int, delta: Delta) -> None:
        if delta.usage is not None:
            self._completion_tokens[index] = delta.usage.completion_tokens
        else:
            self._completion_tokens[index] += len(delta.token_ids)

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's usage object for what was counted so far."""
        prompt = sum(len(stream.prompt_token_ids) for stream in self._firsts)
        completion = sum(self._completion_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(stream.cached_tokens for stream in self._firsts)},
        }


class StreamUsage:
    """What the chunks of a stream say about usage: nothing, everything at the end, or the state with each."""

    def __init__(self, body: GenerationBody, counter: UsageCounter) -> None:
        options = body.stream_options
        self._counter = counter
        self._at_end = options is not None and options.include_usage is True
        self._continuous = self._at_end and options is not None and options.continuous_usage_stats is True

    def mark(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Add to an ordinary chunk what it must say."""
        if self._at_end:
            chunk["usage"] = self._counter.usage() if self._continuous else None
        return chunk

    def last_chunks(self, head: Head, kind: str) -> list[dict[str, Any]]:
        """Return the chunk without choices; clients lose the counts if it has any."""
        return [{**head.chunk(kind, []), "usage": self._counter.usage()}] if self._at_end else []


class AnswerFormat(sse.ChunkFormat, Protocol):
    """How an endpoint spells its answers."""

    def answer(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Return the whole answer; `deltas` has one per stream."""
        ...


class TypedAnswerFormat(AnswerFormat, sse.TypedFormat, Protocol):
    """How an endpoint whose events have types spells its answers."""


async def submit(
    services: Services,
    caller: Caller,
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
) -> list[Stream]:
    """Submit all samples of all prompts; they are aborted when the caller's request ends, however it ends."""
    if body.temperature is not None and body.temperature < params.temperature:
        caller.warn(f"temperature raised to {params.temperature}")
    if body.priority and services.config.engine.scheduling_policy != "priority":
        caller.warn("priority counts only with --scheduling-policy priority")
    return await services.open_streams(
        caller.lifetime,
        prompts,
        params,
        priority=body.priority or 0,
        salt=services.cache_scope(caller.key_id, body.cache_salt),
        background=caller.background,
        operation="text_completion" if isinstance(body, CompletionBody) else "chat",
    )


class _Paced:
    """A stream in larger pieces: after the first, a delta has at least `interval` tokens or is the last one."""

    def __init__(self, stream: Stream, interval: int) -> None:
        self._stream = stream
        self._interval = interval
        self._wanted = 1
        self._held: list[Delta] = []
        self._error: Exception | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """Wait for enough; cancelled, it loses nothing. Raises what the stream raises, after what came before that."""
        if self._error is not None:
            raise self._error
        try:
            while sum(len(delta.token_ids) for delta in self._held) < self._wanted:
                self._held.append(await anext(self._stream))
        except StopAsyncIteration:
            if not self._held:
                raise
        except Exception as error:
            if not self._held:
                raise
            self._error = error
        self._wanted = self._interval
        deltas, self._held = self._held, []
        return Delta.joined(deltas)


async def answer(
    caller: Caller, body: GenerationBody, streams: Sequence[Stream], form: AnswerFormat
) -> Response | dict[str, Any]:
    """Answer whole, or as a stream once its first token exists."""
    if not body.stream:
        # One after the other: the engine waits for no reader, and what is not read yet is merged.
        with caller.deadline.kept():
            deltas = [await stream.collect() for stream in streams]
        return form.answer(deltas)
    interval = body.stream_interval or 1
    paced = streams if interval == 1 else [_Paced(one, interval) for one in streams]
    feed = sse.DeltaFeed(paced, caller.lifetime, caller.deadline, caller.keep_alive_s)
    first = await feed.next()
    return Response(sse.event_stream(feed, first, form), headers=sse.HEADERS)


async def typed_answer(
    caller: Caller, stream: Stream, form: TypedAnswerFormat, *, streamed: bool
) -> Response | dict[str, Any]:
    """Answer in the same way for an API whose events have types."""
    if not streamed:
        with caller.deadline.kept():
            delta = await stream.collect()
        return form.answer([delta])
    feed = sse.DeltaFeed([stream], caller.lifetime, caller.deadline, caller.keep_alive_s)
    first = await feed.next()
    return Response(sse.typed_event_stream(feed, first, form), headers=sse.HEADERS)
