"""Run many prompts through one engine at once, with progress: for `LLM` and `trio-llm generate`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import trio

from trio_llm.engine.engine import Engine
from trio_llm.engine.nursery import open_nursery
from trio_llm.engine.samples import open_samples
from trio_llm.engine.stream import Delta, Stream
from trio_llm.messages import FinishReason, TokenLogprobs
from trio_llm.params import Submission


@attrs.frozen
class CompletionOutput:
    """One sample of a prompt.

    Attributes:
        request_id: The engine's own number, for `LLM.explain`; two samples are equal without it.
        message: The text as an assistant's message in OpenAI's form: content, reasoning and tool_calls. Only from
            `LLM.chat`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    request_id: int = attrs.field(eq=False)
    message: Mapping[str, Any] | None = None


@attrs.frozen
class RequestOutput:
    """A prompt and its samples. `prompt` is None if token ids were given."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int


@attrs.frozen
class EmbeddingOutput:
    """A prompt and its vector."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    embedding: tuple[float, ...]


@attrs.frozen
class Request:
    """The caller's prompt, None for token ids, and its submission."""

    prompt: str | None
    submission: Submission


@attrs.frozen
class Progress:
    """Tokens of one request since its last progress; the last one has the `output`."""

    index: int
    prompt_tokens: int = 0
    new_tokens: int = 0
    output: RequestOutput | EmbeddingOutput | None = None


Put = Callable[[Progress], None]
Work = Callable[[Engine, Sequence[Request], Put], Awaitable[None]]


async def generate(engine: Engine, requests: Sequence[Request], put: Put) -> None:
    """Complete requests, started in order, at most as many at once as the engine admits."""

    async def answer(index: int, request: Request, task_status: trio.TaskStatus[None]) -> None:
        async with open_samples(engine, request.submission) as streams:
            task_status.started()
            answers: dict[int, CompletionOutput] = {}
            async with open_nursery() as readers:
                for at, stream in enumerate(streams):
                    readers.start_soon(read, index, at, stream, answers)
            outputs = tuple(answers[at] for at in range(len(streams)))
            first = streams[0]
            put(
                Progress(
                    index,
                    output=RequestOutput(
                        request.prompt,
                        request.submission.prompt_token_ids,
                        first.prompt_logprobs,
                        outputs,
                        first.cached_tokens,
                    ),
                )
            )

    async def read(index: int, at: int, stream: Stream, answers: dict[int, CompletionOutput]) -> None:
        deltas: list[Delta] = []
        async for delta in stream:
            prompt_tokens = 0 if at or deltas else len(stream.prompt_token_ids)
            put(Progress(index, prompt_tokens, len(delta.token_ids)))
            deltas.append(delta)
        whole = Delta.joined(deltas)
        assert whole.finish_reason is not None
        answers[at] = CompletionOutput(
            at,
            whole.text,
            whole.token_ids,
            whole.logprobs,
            whole.finish_reason,
            whole.stop_reason,
            stream.request_id,
        )

    await _start_in_order(engine, requests, lambda request: request.submission.num_samples, answer)


async def embed(engine: Engine, requests: Sequence[Request], put: Put) -> None:
    """Embed requests, at most as many at once as the engine admits."""

    async def answer(index: int, request: Request, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        vector, usage = await engine.embed(request.submission)
        put(
            Progress(
                index,
                usage.prompt_tokens,
                0,
                EmbeddingOutput(request.prompt, request.submission.prompt_token_ids, vector),
            )
        )

    await _start_in_order(engine, requests, lambda _: 1, answer)


async def _start_in_order(
    engine: Engine,
    requests: Sequence[Request],
    places_of: Callable[[Request], int],
    answer: Callable[..., Awaitable[None]],
) -> None:
    free = trio.Semaphore(engine.max_requests)

    async def hold(places: int, index: int, request: Request, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            await answer(index, request, task_status)
        finally:
            for _ in range(places):
                free.release()

    async with open_nursery() as nursery:
        for index, request in enumerate(requests):
            # The engine refuses more samples than it has places.
            places = min(places_of(request), engine.max_requests)
            for _ in range(places):
                await free.acquire()
            await nursery.start(hold, places, index, request)


@contextmanager
def progress_bar(total: int, enabled: bool) -> Generator[Put, None, None]:
    """Show requests done, and prefill and decode tokens per second since the start."""
    if not enabled:
        yield lambda _: None
        return
    from tqdm import tqdm

    prompt_tokens = new_tokens = 0
    start_s = time.perf_counter()
    with tqdm(total=total, desc="Prompts", unit="prompt", dynamic_ncols=True) as bar:

        def show(progress: Progress) -> None:
            nonlocal prompt_tokens, new_tokens
            prompt_tokens += progress.prompt_tokens
            new_tokens += progress.new_tokens
            elapsed_s = max(time.perf_counter() - start_s, 1e-9)
            rates = f"prefill {prompt_tokens / elapsed_s:.0f} tok/s, decode {new_tokens / elapsed_s:.0f} tok/s"
            bar.set_postfix_str(rates, refresh=False)
            bar.update(progress.output is not None)

        yield show
