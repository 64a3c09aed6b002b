"""Shared by chat and completions: submit, count tokens, and answer whole or as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

import attrs
import trio
from msgspec import Struct
from quart import Response, g, request

import trio_llm
from trio_llm.engine import Delta, Stream
from trio_llm.messages import TokenLogprobs
from trio_llm.params import SamplingParams, Submission
from trio_llm.server.answers.base import CachedTokens, TokenUsage
from trio_llm.server.answers.completions import ChatCompletionChunk, Completion
from trio_llm.server.bodies.request_body import current_config, warn
from trio_llm.server.bodies.types import CompletionBody, GenerationBody
from trio_llm.server.generation.prompts import MAX_INLINE_CHARS, run
from trio_llm.server.generation.timings import timings
from trio_llm.server.http import sse
from trio_llm.server.http.deadline import Deadline
from trio_llm.server.http.edge import LIFETIME, Lifetime
from trio_llm.server.http.json_response import json_response
from trio_llm.server.http.sse import AnswerFormat
from trio_llm.server.services import Services

T = TypeVar("T")
Chunk = TypeVar("Chunk", Completion, ChatCompletionChunk)
# A log-probability is collected and written in 10 microseconds, a character tokenized in 2.
_CHARS_PER_LOGPROB = 5
FINGERPRINT = f"trio-llm-{trio_llm.__version__}"


@attrs.frozen
class Head:
    """The fields that are equal in every chunk of an answer. Only clients use the id."""

    id: str
    created: int
    model: str

    @classmethod
    def make(cls, prefix: str, model: str, request_id: str | None = None) -> Head:
        return cls(f"{prefix}-{request_id or secrets.token_hex(12)}", int(time.time()), model)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a chat answer, a completion and their chunks."""
        return {"id": self.id, "created": self.created, "model": self.model, "system_fingerprint": FINGERPRINT}


@attrs.frozen(kw_only=True)
class Caller:
    """The source of a request: an HTTP request, or a line of a batch.

    Attributes:
        lifetime: Streams opened for the caller end with it.
        key_id: Id of its API key, None without one.
        warn: Adds a warning to the response; printable ASCII only.
        encode: Turns a whole answer into what the caller takes. A large one is encoded in a worker thread.
        background: Its requests wait behind all others.
        deadline: Of its answer.
        keep_alive_s: Seconds of silence in a stream before a keep-alive; 0 for none.
    """

    lifetime: Lifetime
    key_id: str | None
    warn: Callable[[str], None]
    encode: Callable[[Struct], Any] = json_response
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
    """Counts tokens over the samples of all prompts; a prompt counts once for all its samples."""

    def __init__(self, streams: Sequence[Stream], samples_per_prompt: int) -> None:
        self.streams = streams
        self._firsts = streams[::samples_per_prompt]
        self._completion_tokens = [0] * len(streams)

    def add(self, index: int, delta: Delta) -> None:
        if delta.usage is not None:
            self._completion_tokens[index] = delta.usage.completion_tokens
        else:
            self._completion_tokens[index] += len(delta.token_ids)

    def usage(self) -> TokenUsage:
        """Return the usage so far."""
        prompt = sum(len(stream.prompt_token_ids) for stream in self._firsts)
        completion = sum(self._completion_tokens)
        cached = sum(stream.cached_tokens for stream in self._firsts)
        return TokenUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )


class StreamUsage:
    """The usage in the chunks of a stream: none, only at the end, or in every chunk; and the times in every chunk."""

    def __init__(self, body: GenerationBody, counter: UsageCounter) -> None:
        options = body.stream_options
        self._counter = counter
        self._at_end = options is not None and options.include_usage is True
        self._continuous = self._at_end and options is not None and options.continuous_usage_stats is True
        self._times = body.timings_per_token is True

    def mark(self, chunk: Chunk) -> Chunk:
        """Add usage and times to an ordinary chunk, if requested."""
        if self._at_end:
            chunk.usage = self._counter.usage() if self._continuous else None
        if self._times:
            chunk.timings = timings(self._counter.streams, self._counter.usage())
        return chunk

    def last_chunks(self, head: Head, kind: type[Chunk]) -> list[Chunk]:
        """Return the usage chunk. It has no choices: clients would lose the counts."""
        return [kind(**head.fields, choices=[], usage=self._counter.usage())] if self._at_end else []


def submissions_of(
    services: Services,
    caller: Caller,
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
) -> list[Submission]:
    """Return a submission per prompt, and warn the caller of what is other than asked."""
    if body.temperature is not None and body.temperature < params.temperature:
        caller.warn(f"temperature raised to {params.temperature}")
    if body.priority and services.config.engine.scheduling_policy != "priority":
        caller.warn("priority counts only with --scheduling-policy priority")
    salt = services.cache_scope(caller.key_id, body.cache_salt)
    return [
        Submission(
            prompt,
            params,
            priority=body.priority or 0,
            background=caller.background,
            salt=salt,
            reports_progress=body.return_progress is True,
        )
        for prompt in prompts
    ]


async def submit(
    services: Services,
    caller: Caller,
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    answer_id: str,
) -> list[Stream]:
    """Submit all samples of all prompts; they are aborted when the caller's request ends.

    The caller can ask about them, and cancel them, by `answer_id`.
    """
    submissions = submissions_of(services, caller, body, prompts, params)
    operation = "text_completion" if isinstance(body, CompletionBody) else "chat"
    streams = await services.open_streams(caller.lifetime, submissions, operation)
    samples = tuple(stream.request_id for stream in streams)
    services.own_requests.add(caller.key_id, answer_id, samples)
    caller.lifetime.stack.callback(services.own_requests.end, caller.key_id, answer_id, samples)
    return streams


class _Paced:
    """A stream with larger deltas: after the first, each has at least `interval` tokens or is the last one."""

    def __init__(self, stream: Stream, interval: int) -> None:
        self.notify = stream.notify
        self._stream = stream
        self._interval = interval
        self._min_tokens = 1
        self._held: list[Delta] = []
        self._error: Exception | None = None

    @property
    def ended(self) -> bool:
        return self._stream.ended and not self._held and self._error is None

    def take(self) -> Delta | None:
        """Return enough tokens, or None. Tokens come before their stream's exception."""
        if self._error is not None:
            raise self._error
        try:
            # To its end: of tokens and an exception that came together, the stream gives one at a time.
            while (delta := self._stream.take()) is not None:
                if delta.progress is not None:
                    return delta
                self._held.append(delta)
        except Exception as error:
            if not self._held:
                raise
            self._error = error
        enough = sum(len(delta.token_ids) for delta in self._held) >= self._min_tokens
        if not self._held or not (enough or self._stream.ended or self._error):
            return None
        self._min_tokens = self._interval
        deltas, self._held = self._held, []
        return Delta.joined(deltas)


def is_large(entries: Sequence[TokenLogprobs | None]) -> bool:
    """Return whether so many log-probabilities are written in a thread."""
    return _num_logprobs(entries) * _CHARS_PER_LOGPROB > MAX_INLINE_CHARS


def _num_logprobs(entries: Sequence[TokenLogprobs | None]) -> int:
    # Every position reports about as many as the last one; the first of a prompt has none.
    last = entries[-1] if entries else None
    return 0 if last is None else len(entries) * (1 + len(last.top))


def _size(streams: Sequence[Stream], deltas: Sequence[Delta]) -> int:
    """Return the size of whole answers, in the measure of `run`: their characters and log-probabilities."""
    reported = [entries for delta in deltas if (entries := delta.logprobs)]
    reported += [entries for stream in streams if (entries := stream.prompt_logprobs)]
    return sum(map(_num_logprobs, reported)) * _CHARS_PER_LOGPROB + sum(len(delta.text) for delta in deltas)


async def all_of(works: Sequence[Callable[[], Awaitable[T]]], at_once: int | None = None) -> list[T]:
    """Do all concurrently, at most `at_once` of them; return the results in order.

    The first failure cancels the others, and is raised as itself: one error is the request's, not a group of them.
    """
    results: dict[int, T] = {}
    failures: list[Exception] = []
    room = trio.Semaphore(at_once or len(works))

    async def do(index: int, work: Callable[[], Awaitable[T]]) -> None:
        try:
            results[index] = await work()
        except Exception as error:  # noqa: BLE001 - raised below
            failures.append(error)
            nursery.cancel_scope.cancel()
        finally:
            room.release()

    async with trio.open_nursery() as nursery:
        for index, work in enumerate(works):
            await room.acquire()
            nursery.start_soon(do, index, work)
    if failures:
        raise failures[0]
    return [results[index] for index in range(len(works))]


async def answer(
    services: Services,
    caller: Caller,
    streams: Sequence[Stream],
    form: AnswerFormat,
    *,
    streamed: bool,
    interval: int = 1,
) -> Any:
    """Answer whole, as the caller encodes it, or by a response that streams once its first token exists.

    Args:
        interval: Minimum of tokens per chunk.
    """
    if not streamed:
        # At once: readers find stop strings, and what nobody reads runs past them.
        with caller.deadline.enforced():
            deltas = await all_of([stream.collect for stream in streams])
        return await run(services, lambda: caller.encode(form.answer(deltas)), chars=_size(streams, deltas))
    paced = streams if interval == 1 else [_Paced(one, interval) for one in streams]
    feed = sse.DeltaFeed(paced, caller.lifetime, caller.deadline, caller.keep_alive_s)
    first = await feed.next()
    return Response(sse.event_stream(feed, first, form, services.threads.run), headers=sse.HEADERS)
