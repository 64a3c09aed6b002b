"""The handle that clients of the engine hold. Everything on it is safe to call from any task of its Trio run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import attrs
from prometheus_client import CollectorRegistry

from trio_llm.engine.stream import Stream
from trio_llm.messages import ModelInfo, PoolingParams, SamplingParams, Usage
from trio_llm.tokenizer import Tokenizer


@attrs.frozen
class Health:
    """Whether requests are served. Only "ok" is healthy; `reason` says why it is not, for the operator's log."""

    status: Literal["ok", "stalled", "draining", "dead"]
    reason: str | None = None
    num_running: int = 0
    num_waiting: int = 0


class Engine:
    """One model being served; made by `trio_llm.open_engine`.

    Attributes:
        info: What is served; `info.max_model_len` is the longest prompt plus output that is accepted.
        registry: Prometheus registry of this engine alone; the server adds its own series to it.
    """

    info: ModelInfo
    tokenizer: Tokenizer
    registry: CollectorRegistry

    def open_stream(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        leader: int | None = None,
    ) -> Stream:
        """Submit one request and return its stream; use it as `async with engine.open_stream(...) as stream`.

        Refusals are raised here, at the call, before anything was sent to anyone. `params.n` is not looked at:
        n samples are n streams, see `open_samples`. `max_tokens` is clamped to what is left of the context.

        Args:
            priority: Smaller goes first, under the "priority" policy.
            salt: Requests share cached prompt blocks only within one salt.
            leader: The request_id of an open stream with the same prompt whose prefill this one waits for.
        Raises:
            InvalidRequestError: It can never be served; names the parameter. Too long a prompt has the code
                "context_length_exceeded" and both numbers in its message.
            OverloadedError: The queue is full.
            DrainingError: The engine is shutting down.
            EngineDeadError: The engine stopped.
        """
        raise NotImplementedError

    async def embed(
        self, prompt_token_ids: Sequence[int], params: PoolingParams, *, priority: int = 0, salt: bytes = b""
    ) -> tuple[tuple[float, ...], Usage]:
        """Return the prompt's embedding. Raises what `open_stream` and its iteration raise; cancelling aborts."""
        raise NotImplementedError

    def health(self) -> Health:
        """Say whether requests are served right now. Cheap, never blocks, asks nobody."""
        raise NotImplementedError

    def drain(self) -> None:
        """Refuse new requests with DrainingError from now on; accepted ones run to their end."""
        raise NotImplementedError

    async def wait_idle(self) -> None:
        """Wait until every accepted request has ended. Raises EngineDeadError if the engine stops first."""
        raise NotImplementedError

    def render_metrics(self) -> bytes:
        """Return all series in Prometheus text format. Takes milliseconds; call it in a thread when that matters."""
        raise NotImplementedError
