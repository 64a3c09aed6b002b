"""Text out of tokens, piece by piece, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INVALID = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""

MAX_WAITING_TOKENS = 3
"""A character has at most 4 bytes, so no more tokens than this can wait for the rest of one."""

MAX_PENDING_TOKENS = 8
"""With so many tokens held back some are really invalid. Above MAX_WAITING_TOKENS, so as to settle several at once."""

MAX_CONTEXT_TOKENS = 16
"""Above this the window is cut. Pulled out of the air: cutting costs a decode, and so does every token of context."""


class Detokenizer:
    """Decodes a growing output a window at a time.

    New tokens are decoded behind earlier ones, the context, because decoders treat the first token in a special way
    (a leading space is dropped). Text that ends in U+FFFD stays pending until the character is whole. The text does
    not depend on how the tokens are cut into calls, and each token is decoded a bounded number of times.

    Args:
        decode: Token ids -> text, with U+FFFD for invalid bytes. Byte-level BPE decodes to one U+FFFD for an
            unfinished character, byte fallback to one per byte.
        prompt_token_ids: What the output follows. If it ends within a character that the output completes, the
            whole character is output.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(prompt_token_ids[-MAX_PENDING_TOKENS:])
        self._context_text = decode(self._context) if self._context else ""
        self._pending: list[int] = []
        self._owed = ""  # Text of pending tokens that belong to the prompt: not output unless it still changes.
        if self._context_text.endswith(INVALID):
            self._split_prompt()

    def add(self, token_ids: Sequence[int]) -> str:
        """Take tokens and return the text that became certain."""
        return "".join([self._add(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """Return what was held back: it is invalid, or was cut off within a character."""
        text = self._output(self._beyond_context(self._pending)) if self._pending else ""
        self._pending = []
        return text

    def _split_prompt(self) -> None:
        """Move the unfinished character at the prompt's end from the context to the pending tokens."""
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
            return self._settle() if len(self._pending) >= MAX_PENDING_TOKENS else ""
        joined = text.startswith(self._context_text)
        new = text[len(self._context_text) :] if joined else self._decode(self._pending)
        if new:
            self._move_on(text, joined=joined)
            return self._output(new)
        if self._context_text or len(self._pending) >= MAX_PENDING_TOKENS:
            self._pending = []  # Tokens without text, such as special ones. At the very start a lone space is one too.
        return ""

    def _move_on(self, text: str, *, joined: bool) -> None:
        """Make the pending tokens part of the context, or where that would grow too long, all of it."""
        if joined and len(self._context) + len(self._pending) <= MAX_CONTEXT_TOKENS:
            self._context += self._pending
            self._context_text = text
        else:
            self._context = self._pending
            self._context_text = self._decode(self._pending)
        self._pending = []

    def _settle(self) -> str:
        """Return the text of the oldest pending tokens, which no further byte can make valid."""
        text = self._beyond_context(self._pending)
        kept = MAX_WAITING_TOKENS
        head = self._beyond_context(self._pending[:-kept])
        # Where a character straddles the cut, the halves decode to something else than the whole: cut earlier.
        while head + self._decode(self._pending[-kept:]) != text and kept < MAX_PENDING_TOKENS - 1:
            kept += 1
            head = self._beyond_context(self._pending[:-kept])
        self._context, self._context_text = [], ""
        self._pending = self._pending[-kept:]
        return self._output(head)

    def _beyond_context(self, token_ids: list[int]) -> str:
        """Decode tokens behind the context; alone where joining the two would change the context (byte fallback)."""
        text = self._decode(self._context + token_ids)
        return text[len(self._context_text) :] if text.startswith(self._context_text) else self._decode(token_ids)

    def _output(self, text: str) -> str:
        owed, self._owed = self._owed, ""
        return text.removeprefix(owed)
