"""Incremental detokenization that never emits part of a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INVALID = "\ufffd"
"""The replacement character, which a decoder writes for bytes that are not a complete character."""

MAX_WAITING_TOKENS = 3
"""A character has at most 4 bytes, so at most this many tokens can wait for the rest of one."""

MAX_PENDING_TOKENS = 8
"""If this many tokens are pending, some are invalid. Above MAX_WAITING_TOKENS, so that several are flushed at once."""

MAX_CONTEXT_TOKENS = 8
"""Above this the context is cut: cutting costs a decode, and so does every token of context. Measured with the demo
model's tokenizer, in us a token: 2 tokens 4.1, 4 3.5, 8 3.4, 16 4.1."""


class Detokenizer:
    """Decodes a growing output in a sliding window.

    New tokens are decoded after earlier ones, the context, because decoders treat the first token specially (they drop
    a leading space). Text that ends in U+FFFD stays pending until the character is complete. The text does not depend
    on how the tokens are split into calls, and each token is decoded a bounded number of times.

    Args:
        decode: Token ids -> text, with U+FFFD for invalid bytes. Byte-level BPE decodes to one U+FFFD for an
            unfinished character, byte fallback to one per byte.
        prompt_token_ids: The prompt. If it ends inside a character that the output completes, the whole character is
            part of the output.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(prompt_token_ids[-MAX_PENDING_TOKENS:])
        self._context_text = decode(self._context) if self._context else ""
        self._pending: list[int] = []
        self._owed = ""  # Text of pending prompt tokens; only emitted if it still changes.
        if self._context_text.endswith(INVALID):
            self._split_prompt()

    def add(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text that is now certain."""
        return "".join([self._add(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """Return the text of the pending tokens, which are invalid or an incomplete character."""
        text = self._output(self._beyond_context(self._pending)) if self._pending else ""
        self._pending = []
        return text

    def _split_prompt(self) -> None:
        """Move an incomplete character at the end of the prompt from the context to the pending tokens."""
        for size in range(1, min(MAX_WAITING_TOKENS, len(self._context)) + 1):
            text = self._decode(self._context[:-size])
            if not text.endswith(INVALID):
                self._pending = self._context[-size:]
                self._owed = self._context_text[len(text) :]
                self._context, self._context_text = self._context[:-size], text
                return

    def _add(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if text.endswith(INVALID):
            return self._flush() if len(self._pending) >= MAX_PENDING_TOKENS else ""
        joined = text.startswith(self._context_text)
        new = text[len(self._context_text) :] if joined else self._decode(self._pending)
        if new:
            self._move_on(text, joined=joined)
            return self._output(new)
        if self._context_text or len(self._pending) >= MAX_PENDING_TOKENS:
            self._pending = []  # Tokens without text, such as special tokens, or a single space at the start.
        return ""

    def _move_on(self, text: str, *, joined: bool) -> None:
        """Append the pending tokens to the context, or replace the context if it would become too long."""
        if joined and len(self._context) + len(self._pending) <= MAX_CONTEXT_TOKENS:
            self._context += self._pending
            self._context_text = text
        else:
            self._context = self._pending
            self._context_text = self._decode(self._pending)
        self._pending = []

    def _flush(self) -> str:
        """Return the text of the oldest pending tokens, which no further byte can make valid."""
        text = self._beyond_context(self._pending)
        num_kept = MAX_WAITING_TOKENS
        head = self._beyond_context(self._pending[:-num_kept])
        # If a character straddles the cut, the halves decode differently from the whole: cut earlier.
        while head + self._decode(self._pending[-num_kept:]) != text and num_kept < MAX_PENDING_TOKENS - 1:
            num_kept += 1
            head = self._beyond_context(self._pending[:-num_kept])
        self._context, self._context_text = [], ""
        self._pending = self._pending[-num_kept:]
        return self._output(head)

    def _beyond_context(self, token_ids: list[int]) -> str:
        """Decode tokens after the context, or alone if joining would change the context (byte fallback)."""
        text = self._decode(self._context + token_ids)
        return text[len(self._context_text) :] if text.startswith(self._context_text) else self._decode(token_ids)

    def _output(self, text: str) -> str:
        owed, self._owed = self._owed, ""
        return text.removeprefix(owed)
