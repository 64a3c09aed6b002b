"""The client's end of a request: turns tokens into text, in the client's own task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import attrs
import trio

from trio_llm.engine.mailbox import Mailbox
from trio_llm.engine.request_times import RequestTimes
from trio_llm.engine.text import OutputText
from trio_llm.messages import (
    Embedding,
    Event,
    Failed,
    Finished,
    FinishReason,
    Progress,
    PromptLogprobs,
    Started,
    TokenLogprobs,
    Tokens,
    Usage,
)
from trio_llm.params import SamplingParams, Submission


@attrs.frozen
class Delta:
    """The output since the last delta. A slow reader gets few large deltas, a fast one a token at a time.

    Concatenated over a stream, `text`, `token_ids` and `logprobs` are the whole output. `text` may lag behind
    `token_ids` and may be empty: part of a character, or of a possible stop string, is held back.

    Attributes:
        logprobs: One entry per id in `token_ids`; None if the request did not ask for them.
        finish_reason: Only on the last delta.
        progress: Tokens of the prompt that are done; None once there is output, or if the request did not ask.
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
    progress: int | None = None

    @property
    def cut_short(self) -> bool:
        """Whether the answer ends here and is not complete: by its length, or cancelled."""
        return self.finish_reason in ("length", "abort")

    @classmethod
    def joined(cls, deltas: Sequence[Delta]) -> Delta:
        """Merge the deltas of a whole stream."""
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
    """An accepted request. Iterate over it inside `async with`; leaving the block early aborts the request.

    The request runs as soon as the stream exists, whether it is read or not. No output is dropped, and the engine never
    waits for the reader. One reader at a time.

    Attributes:
        request_id: The engine's own number, not the client's.
        prompt_logprobs: One entry per prompt token (None for the first), from the first delta on; None if not
            requested.
        cached_tokens: Prompt tokens found in the prefix cache; 0 until the request is scheduled.
        times: When it got how far.
    """

    def __init__(
        self,
        request_id: int,
        submission: Submission,
        decode: Callable[..., str],
        mailbox: Mailbox,
        times: RequestTimes,
    ) -> None:
        params = submission.params
        assert isinstance(params, SamplingParams)
        self.request_id = request_id
        self.prompt_token_ids = submission.prompt_token_ids
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.cached_tokens = 0
        self.times = times
        self._params = params
        self._mailbox = mailbox
        self._text = OutputText(
            partial(decode, skip_special_tokens=params.skip_special_tokens),
            submission.prompt_token_ids,
            params.stop,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            repetition=params.repetition_detection,
        )
        self._last: Finished | Failed | None = None
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the last delta was returned, or an exception raised instead."""
        return self._ended

    @property
    def num_tokens(self) -> int:
        """Number of output tokens read so far."""
        return self._text.num_tokens

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading, and abort the request if it still runs. Synchronous, so it works in a cancelled task."""
        self._mailbox.close("abort")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """Wait for new output and return all of it, merged. Raises what `take` raises."""
        while not self._ended:
            events = await self._mailbox.receive() if self._last is None else []
            if (delta := self._digest(events)) is not None:
                return delta
        raise StopAsyncIteration

    def take(self) -> Delta | None:
        """Return all new output, merged, without waiting; None if there is none, or if the stream has ended.

        Raises:
            RequestFailedError: The model failed on this request.
            EngineDeadError: The engine stopped.
            InvalidRequestError: The tokenizer cannot decode the output.
            trio.ClosedResourceError: The stream is closed.
        """
        while not self._ended:
            events = self._mailbox.take() if self._last is None else []
            if (delta := self._digest(events)) is not None or not events:
                return delta
        return None

    def notify(self, reader: trio.lowlevel.ParkingLot) -> None:
        """Unpark the task that is parked in `reader` whenever there is something to take."""
        self._mailbox.wakeup = reader

    async def collect(self) -> Delta:
        """Read to the end and return all output as one delta. Raises what iterating raises."""
        return Delta.joined([delta async for delta in self])

    def _digest(self, events: Sequence[Event]) -> Delta | None:
        """Merge events into a delta; None if they contain no output."""
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        progress: int | None = None
        for event in events:
            match event:
                case Progress():
                    progress = event.num_tokens
                case Tokens():
                    token_ids.extend(event.token_ids)
                    logprobs.extend(event.logprobs or ())
                case Started():
                    self.cached_tokens = event.cached_tokens
                case PromptLogprobs():
                    self.prompt_logprobs = event.entries
                case Finished() if self._params.max_tokens == 0 and event.reason != "abort":
                    self._last = attrs.evolve(event, reason="length", stop_token_id=None)
                case Finished() | Failed():
                    self._last = event
                case Embedding():
                    raise AssertionError("an embedding on a text stream")
        if self._params.max_tokens == 0:  # A request that only scores its prompt; one token was sampled nevertheless.
            token_ids.clear()
            logprobs.clear()
        if isinstance(self._last, Failed) and not token_ids:
            self._ended = True
            self._mailbox.close(None)
            raise self._last.error
        delta = self._delta(token_ids, logprobs, self._last if isinstance(self._last, Finished) else None)
        if delta is None and progress is not None:
            return Delta("", (), None, None, None, None, progress)
        return delta

    def _delta(self, token_ids: list[int], logprobs: list[TokenLogprobs], finished: Finished | None) -> Delta | None:
        # The token that ended the request is reported, but its text is not part of the answer.
        hides_last = finished is not None and finished.reason == "stop" and not self._params.include_stop_str_in_output
        hidden = token_ids[-1:] if hides_last else []
        visible = len(token_ids) - len(hidden)
        text, taken = self._text.add(token_ids[:visible])
        runs = finished is None
        if taken < visible:
            finished = None  # Discard tokens after the stop.
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
        """Return finish and stop reason. A match in the text takes precedence over the engine's reason."""
        if self._text.matched is not None:
            return "stop", self._text.matched
        if finished is not None:
            return finished.reason, finished.stop_token_id
        return ("repetition", "repetition_detected") if self._text.repeats else (None, None)

    def _usage(self) -> Usage:
        return Usage(len(self.prompt_token_ids), self._text.num_tokens, self.cached_tokens)
