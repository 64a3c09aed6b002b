"""A client's end of one request: what the engine produced, turned into text in the client's own task."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import attrs
import trio

from trio_llm.engine.text import OutputText
from trio_llm.errors import EngineDeadError
from trio_llm.messages import Embedding, Event, Failed, Finished, FinishReason, PromptLogprobs, Started, TokenLogprobs
from trio_llm.messages import Tokens, Usage


@attrs.frozen
class Delta:
    """What a request produced since the last delta; a slow reader gets few large ones, a fast one a token each.

    Concatenated over a stream, `text`, `token_ids` and `logprobs` are the whole output. `text` may lag behind
    `token_ids`: half a character, or what may become a stop string, is held back. It may be empty.

    Attributes:
        logprobs: One entry per id in `token_ids`; None when the request did not ask.
        finish_reason: None except on the last delta, of which there is exactly one.
        stop_reason: The stop string or stop token id that ended the request; None for end of sequence or length.
        usage: Only on the last delta.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    usage: Usage | None


class Stream:
    """One accepted request. Iterate over it for its deltas, inside `async with`: leaving the block early aborts.

    The request runs from the moment the stream exists, read or not; nothing it produces is dropped and the
    engine never waits for its reader. One reader at a time.

    Attributes:
        request_id: The engine's own number, never one chosen by a client.
        prompt_logprobs: One entry per prompt token (None for the first), from the first delta on; None if not asked.
        cached_tokens: Tokens of the prompt found in the prefix cache; 0 until the request was scheduled.
    """

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: tuple[int, ...],
        events: trio.MemoryReceiveChannel[Event],
        text: OutputText,
        on_close: Callable[[int], None],
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.cached_tokens = 0
        self._events = events
        self._text = text
        self._on_close = on_close
        self._ended = False
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; abort the request if it still runs. Synchronous, so that it works in a cancelled task."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """Wait for something new and return all of it, merged.

        Raises:
            RequestFailedError: The model failed for this request alone.
            EngineDeadError: The engine stopped.
            InvalidRequestError: The tokenizer cannot decode what was produced.
        """
        raise NotImplementedError

    async def collect(self) -> Delta:
        """Read to the end and return all of it as one delta. Raises what iterating raises."""
        raise NotImplementedError
