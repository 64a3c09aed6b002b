"""Tokens to text: detokenizing and stop strings of one request (pure, synchronous)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trio_llm.core.detokenizer import Detokenizer
from trio_llm.core.repetition import RepetitionDetector
from trio_llm.core.stop import StopStrings
from trio_llm.params import RepetitionDetection


class OutputText:
    """The text of one request's output. It runs in the client's task, so a failing tokenizer affects one request only.

    Attributes:
        num_tokens: Tokens added so far.
        matched: The stop string that ended the output; nothing may be added after it.
        repeats: The output repeats itself; nothing may be added after that.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        repetition: RepetitionDetection | None = None,
    ) -> None:
        self.num_tokens = 0
        self.matched: str | None = None
        self.repeats = False
        self._detokenizer = Detokenizer(decode, prompt_token_ids)
        self._stop = StopStrings(stop, include=include_stop) if stop else None
        self._repetition = RepetitionDetector(repetition) if repetition is not None else None
        self._min_tokens = min_tokens

    def add(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Add tokens; return new text and how many tokens were used: fewer if the output ended before the last."""
        if self._stop is None and self._repetition is None:
            self.num_tokens += len(token_ids)
            return self._detokenizer.add(token_ids), len(token_ids)
        parts: list[str] = []
        for taken, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            # The text of the first min_tokens tokens cannot complete a stop string, but it may begin one.
            may_end = self.num_tokens > self._min_tokens
            parts.append(self._match(self._detokenizer.add((token_id,)), may_end=may_end))
            if self._repetition is not None:
                self.repeats = self._repetition.add(token_id) and self.num_tokens >= self._min_tokens
            if self.matched is not None or self.repeats:
                return "".join(parts), taken
        return "".join(parts), len(token_ids)

    def end(self, hidden_token_ids: Sequence[int] = ()) -> str:
        """Return the text held back. `hidden_token_ids` count as output but have no text (a stop token)."""
        self.num_tokens += len(hidden_token_ids)
        text = self._match(self._detokenizer.finish(), may_end=self.num_tokens > self._min_tokens)
        if self._stop is not None and self.matched is None:
            text += self._stop.finish()
        return text

    def _match(self, text: str, *, may_end: bool) -> str:
        if self._stop is None or not text:
            return text
        text, self.matched = self._stop.add(text, may_end=may_end)
        return text
