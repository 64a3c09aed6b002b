"""Many prompts through one engine at once, with progress: what `LLM` and `trio-llm generate` do."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import trio

from trio_llm.engine.engine import Engine
from trio_llm.engine.nursery import open_nursery
from trio_llm.engine.samples import open_samples
from trio_llm.engine.stream import Delta, Stream
from trio_llm.messages import FinishReason, TokenLogprobs


@attrs.frozen
class CompletionOutput:
    """One sample of a prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    stop_reason: int | str | None


@attrs.frozen
class RequestOutput:
    """A prompt and its samples. `prompt` is None where token ids were given."""

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
    """A prompt and its SamplingParams or PoolingParams."""

    prompt: str | None
    token_ids: tuple[int, ...]
    params: Any


@attrs.frozen
class Progress:
    """Tokens of one request since its last progress; `output` with its last one."""

    index: int
    prompt_tokens: int = 0
    new_tokens: int = 0
    output: RequestOutput | EmbeddingOutput | None = None


Put = Callable[[Progress], None]
Work = Callable[[Engine, Sequence[Request], Put], Awaitable[None]]


async def generate(engine: Engine, requests: Sequence[Request], put: Put) -> None:
    """Complete requests, started in their order and never more at once than the engine admits."""

    async def answer(index: int, request: Request, task_status: trio.TaskStatus[None]) -> None:
        async with open_samples(engine, request.token_ids, request.params) as streams:
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
                        request.prompt, request.token_ids, first.prompt_logprobs, outputs, first.cached_tokens
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
            at, whole.text, whole.token_ids, whole.logprobs, whole.finish_reason, whole.stop_reason
        )

    await _start_in_order(engine, requests, lambda request: request.params.n, answer)


async def embed(engine: Engine, requests: Sequence[Request], put: Put) -> None:
    """Embed requests, never more at once than the engine admits."""

    async def answer(index: int, request: Request, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        vector, usage = await engine.embed(request.token_ids, request.params)
        put(Progress(index, usage.prompt_tokens, 0, EmbeddingOutput(request.prompt, request.token_ids, vector)))

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
            # More samples than there are places is for the engine to refuse.
            places = min(places_of(request), engine.max_requests)
            for _ in range(places):
                await free.acquire()
            await nursery.start(hold, places, index, request)


@contextmanager
def progress_bar(total: int, shown: bool) -> Generator[Put, None, None]:
    """Show requests done, and prefill and decode tokens per second since the start."""
    if not shown:
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
