"""Log-probabilities in the three shapes that clients know: chat, completions, and vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from trio_llm.messages import TokenLogprobs
from trio_llm.tokenizer import Tokenizer

# JSON has no infinity; OpenAI and vLLM send this instead.
_MIN_LOGPROB = -9999.0


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)


@attrs.frozen
class TokenNames:
    """How a token is called in answers.

    Attributes:
        as_ids: "token_id:N" instead of the text.
    """

    tokenizer: Tokenizer
    as_ids: bool = False

    def __call__(self, token_id: int) -> str:
        r"""Return the token's text; "bytes:\xe2" where it is a part of a character, as OpenAI spells it."""
        if self.as_ids:
            return f"token_id:{token_id}"
        data = self.tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(names: TokenNames, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Return `choices[].logprobs` of a chat answer."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        data = list(names.tokenizer.token_bytes(token_id))
        return {"token": names(token_id), "logprob": _finite(logprob), "bytes": data}

    content = [
        {**token(entry.token_id, entry.logprob), "top_logprobs": [token(*pair) for pair in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


@attrs.define
class CompletionLogprobs:
    """Builds `choices[].logprobs` of completions; remembers how far the text has come over several calls."""

    names: TokenNames
    _offset: int = 0

    def take(self, tokens: Sequence[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        """Return the next tokens' columns; a token without an entry (the first of a prompt) has nulls."""
        columns: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, entry in tokens:
            name = self.names(token_id)
            columns["text_offset"].append(self._offset)
            columns["tokens"].append(name)
            columns["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
            columns["top_logprobs"].append(None if entry is None else self._top(entry))
            self._offset += len(name)
        return columns

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Return the likeliest tokens with the chosen one among them: N or N + 1 entries, likeliest first."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top:
            top.setdefault(self.names(token_id), _finite(logprob))
        # The very number of token_logprobs: clients compare the two to see whether a token was the likeliest.
        top[self.names(entry.token_id)] = _finite(entry.logprob)
        return top


def prompt_logprobs(
    names: TokenNames, entries: Sequence[TokenLogprobs | None]
) -> list[dict[str, dict[str, Any]] | None]:
    """Return vLLM's `prompt_logprobs`: per position, token id -> logprob, rank and text."""
    return [None if entry is None else _by_id(names, entry) for entry in entries]


def _by_id(names: TokenNames, entry: TokenLogprobs) -> dict[str, dict[str, Any]]:
    shown = {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": names.tokenizer.token_text(token_id),
        }
        for rank, (token_id, logprob) in enumerate(entry.top, start=1)
    }
    text = names.tokenizer.token_text(entry.token_id)
    shown[str(entry.token_id)] = {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": text}
    return shown
