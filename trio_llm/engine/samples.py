"""Opens n samples of one prompt as n requests, for the server and for `LLM`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import attrs

from trio_llm.engine.engine import Engine
from trio_llm.engine.stream import Stream
from trio_llm.params import SamplingParams, Submission


@asynccontextmanager
async def open_samples(engine: Engine, submission: Submission) -> AsyncGenerator[list[Stream], None]:
    """Open `params.n` streams of one prompt, all or none. Leaving the block aborts those that still run.

    The later ones wait for the first one's prefill and find the prompt in the prefix cache. With a seed, sample i uses
    seed + i, so the first sample is the same as with n = 1.

    Raises:
        What `Engine.open_stream` raises; streams that are already open are aborted.
    """
    params = submission.params
    assert isinstance(params, SamplingParams)
    async with AsyncExitStack() as stack:
        streams: list[Stream] = []
        for index in range(params.n):
            one = attrs.evolve(
                submission,
                params=params if params.seed is None else attrs.evolve(params, seed=_int64(params.seed + index)),
                leader=streams[0].request_id if streams else None,
            )
            streams.append(await stack.enter_async_context(engine.open_stream(one)))
        yield streams


def _int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
