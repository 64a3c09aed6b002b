"""A client's end of one request: what the engine produced, turned into text in the client's own task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import attrs

from trio_llm.engine.mailbox import Mailbox
from trio_llm.engine.text import OutputText
from trio_llm.messages import (
    Embedding,
    Event,
    Failed,
    Finished,
    FinishReason,
    PromptLogprobs,
    SamplingParams,
    Started,
    TokenLogprobs,
    Tokens,
    Usage,
)


@attrs.frozen
class Delta:
    """What a request produced since the last delta; a slow reader gets few large ones, a fast one a token each.

    Concatenated over a stream, `text`, `token_ids` and `logprobs` are the whole output. `text` may lag behind
    `token_ids`: half a character, or what may become a stop string, is held back. It may be empty.

    Attributes:
        logprobs: One entry per id in `token_ids`; None when the request did not ask.
        finish_reason: None except on the last delta, of which there is exactly one.
        stop_reason: The stop string or stop token id that ended the request, or "repetition_detected"; None for end
            of sequence or length.
        usage: Only on the last delta.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    usage: Usage | None

    @classmethod
    def joined(cls, deltas: Sequence[Delta]) -> Delta:
        """Return a whole stream's deltas as one."""
        last = deltas[-1]
        parts = [delta.logprobs for delta in deltas if delta.logprobs is not None]
        return cls(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
            logprobs=tuple(entry for part in parts for entry in part) if parts else None,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            usage=last.usage,
        )


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
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        decode: Callable[[Sequence[int]], str],
        mailbox: Mailbox,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.cached_tokens = 0
        self._params = params
        self._mailbox = mailbox
        self._text = OutputText(
            decode,
            prompt_token_ids,
            params.stop,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            repetition=params.repetition_detection,
        )
        self._last: Finished | Failed | None = None
        self._ended = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer that were read so far."""
        return self._text.num_tokens

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; abort the request if it still runs. Synchronous, so that it works in a cancelled task."""
        self._mailbox.close("abort")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """Wait for something new and return all of it, merged.

        Raises:
            RequestFailedError: The model failed for this request alone.
            EngineDeadError: The engine stopped.
            InvalidRequestError: The tokenizer cannot decode what was produced.
        """
        while not self._ended:
            events = await self._mailbox.receive() if self._last is None else []
            if (delta := self._digest(events)) is not None:
                return delta
        raise StopAsyncIteration

    async def collect(self) -> Delta:
        """Read to the end and return all of it as one delta. Raises what iterating raises."""
        return Delta.joined([delta async for delta in self])

    def _digest(self, events: Sequence[Event]) -> Delta | None:
        """Merge events into a delta; None when they hold nothing to show."""
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for event in events:
            match event:
                case Tokens():
                    token_ids.extend(event.token_ids)
                    logprobs.extend(event.logprobs or ())
                case Started():
                    self.cached_tokens = event.cached_tokens
                case PromptLogprobs():
                    self.prompt_logprobs = event.entries
                case Finished() if self._params.max_tokens == 0:
                    self._last = attrs.evolve(event, reason="length", stop_token_id=None)
                case Finished() | Failed():
                    self._last = event
                case Embedding():
                    raise AssertionError("an embedding on a text stream")
        if self._params.max_tokens == 0:  # A request to score its prompt; one token was sampled all the same.
            token_ids.clear()
            logprobs.clear()
        if isinstance(self._last, Failed) and not token_ids:
            self._ended = True
            self._mailbox.close(None)
            raise self._last.error
        return self._delta(token_ids, logprobs, self._last if isinstance(self._last, Finished) else None)

    def _delta(self, token_ids: list[int], logprobs: list[TokenLogprobs], finished: Finished | None) -> Delta | None:
        # The token that ended the request is reported; its text is not part of the answer.
        hides_last = finished is not None and finished.reason == "stop" and not self._params.include_stop_str_in_output
        hidden = token_ids[-1:] if hides_last else []
        visible = len(token_ids) - len(hidden)
        text, taken = self._text.add(token_ids[:visible])
        runs = finished is None
        if taken < visible:
            finished = None  # What the engine produced after the end of the text is nobody's.
        if self._text.matched is None and (finished is not None or self._text.repeats):
            text += self._text.end(hidden if finished is not None else ())
            taken = taken if finished is None else len(token_ids)
        reason, stop_reason = self._why_ended(finished)
        if not taken and reason is None:
            return None
        if reason is not None:
            self._ended = True
            self._mailbox.close(reason if runs else None)
        return Delta(
            text=text,
            token_ids=tuple(token_ids[:taken]),
            logprobs=None if self._params.logprobs is None else tuple(logprobs[:taken]),
            finish_reason=reason,
            stop_reason=stop_reason,
            usage=self._usage() if reason is not None else None,
        )

    def _why_ended(self, finished: Finished | None) -> tuple[FinishReason | None, int | str | None]:
        """Return finish and stop reason; what the text says goes before what the engine says of the same token."""
        if self._text.matched is not None:
            return "stop", self._text.matched
        if finished is not None:
            return finished.reason, finished.stop_token_id
        return ("repetition", "repetition_detected") if self._text.repeats else (None, None)

    def _usage(self) -> Usage:
        return Usage(len(self.prompt_token_ids), self._text.num_tokens, self.cached_tokens)
