"""n samples of one prompt are n requests: the same helper for the server and for `LLM`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import attrs

from trio_llm.engine.engine import Engine
from trio_llm.engine.stream import Stream
from trio_llm.messages import SamplingParams


@asynccontextmanager
async def open_samples(
    engine: Engine,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    priority: int = 0,
    salt: bytes = b"",
    background: bool = False,
) -> AsyncGenerator[list[Stream], None]:
    """Open `params.n` streams of one prompt, all or none; leaving the block aborts those that still run.

    The later ones wait for the first one's prefill and then find the prompt in the prefix cache. With a seed,
    sample i uses seed + i; the first sample is therefore the one that n = 1 gives.

    Raises:
        What `Engine.open_stream` raises; streams opened before the refusal are aborted.
    """
    async with AsyncExitStack() as stack:
        streams: list[Stream] = []
        for index in range(params.n):
            stream = engine.open_stream(
                prompt_token_ids,
                params if params.seed is None else attrs.evolve(params, seed=_int64(params.seed + index)),
                priority=priority,
                background=background,
                salt=salt,
                leader=streams[0].request_id if streams else None,
            )
            streams.append(await stack.enter_async_context(stream))
        yield streams


def _int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
