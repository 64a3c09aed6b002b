"""Log-probabilities in three formats: chat, completions, and vLLM's prompt_logprobs."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import attrs

from trio_llm.messages import TokenLogprobs
from trio_llm.server.answers.completions import (
    ChatLogprobs,
    ChosenToken,
    CompletionColumns,
    Position,
    PromptLogprobs,
    TokenProbability,
)
from trio_llm.tokenizer import Tokenizer

# JSON has no infinity; OpenAI and vLLM send this instead.
_MIN_LOGPROB = -9999.0


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)


@attrs.frozen
class TokenNames:
    """Names of tokens in answers.

    Attributes:
        as_ids: "token_id:N" instead of the text.
    """

    tokenizer: Tokenizer
    as_ids: bool = False

    def __call__(self, token_id: int) -> str:
        r"""Return the token's text, or OpenAI's "bytes:\xe2" for a part of a character."""
        if self.as_ids:
            return f"token_id:{token_id}"
        data = self.tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(names: TokenNames, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """Return `choices[].logprobs` of a chat answer."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        data = list(names.tokenizer.token_bytes(token_id))
        return {"token": names(token_id), "logprob": _finite(logprob), "bytes": data}

    return ChatLogprobs(
        content=[
            ChosenToken(
                **token(entry.token_id, entry.logprob),
                top_logprobs=[TokenProbability(**token(*pair)) for pair in entry.top],
            )
            for entry in entries
        ]
    )


@attrs.define
class CompletionLogprobs:
    """Builds `choices[].logprobs` of completions; remembers how far the text has come over several calls.

    Attributes:
        shows_special: The text has control tokens too.
    """

    names: TokenNames
    shows_special: bool = False
    _offset: int = 0
    _decoder: codecs.IncrementalDecoder = attrs.field(factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def take(
        self, tokens: Sequence[tuple[int, TokenLogprobs | None]], *, text_chars: int | None = None
    ) -> CompletionColumns:
        """Return the next tokens' columns; a token without an entry (the first of a prompt) has nulls.

        Args:
            text_chars: Length of the whole text, once it is known: no offset is beyond it.
        """
        columns = CompletionColumns(text_offset=[], tokens=[], token_logprobs=[], top_logprobs=[])
        for token_id, entry in tokens:
            name = self.names(token_id)
            columns.text_offset.append(self._offset if text_chars is None else min(self._offset, text_chars))
            columns.tokens.append(name)
            columns.token_logprobs.append(None if entry is None else _finite(entry.logprob))
            columns.top_logprobs.append(None if entry is None else self._top(entry))
            self._offset += self._text_chars(token_id)
        return columns

    def _text_chars(self, token_id: int) -> int:
        """Return how many characters of the text end with a token: a name spells parts of characters longer."""
        tokenizer = self.names.tokenizer
        if token_id in tokenizer.special_tokens.values() and not self.shows_special:
            return 0
        return len(self._decoder.decode(tokenizer.token_bytes(token_id)))

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Return the likeliest tokens with the chosen one among them: N or N + 1 entries, likeliest first."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top:
            top.setdefault(self.names(token_id), _finite(logprob))
        # The same number as in token_logprobs: clients compare the two to detect the likeliest token.
        top[self.names(entry.token_id)] = _finite(entry.logprob)
        return top


def prompt_logprobs(names: TokenNames, entries: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
    """Return vLLM's `prompt_logprobs`: per position, token id -> logprob, rank and text."""
    return [None if entry is None else _by_id(names, entry) for entry in entries]


def _by_id(names: TokenNames, entry: TokenLogprobs) -> dict[str, Position]:
    def position(token_id: int, logprob: float, rank: int) -> Position:
        return Position(logprob=_finite(logprob), rank=rank, decoded_token=names.tokenizer.token_text(token_id))

    positions = {
        str(token_id): position(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, 1)
    }
    positions[str(entry.token_id)] = position(entry.token_id, entry.logprob, entry.rank)
    return positions
