"""Thinking between <think> and </think>, split from the answer (Qwen3, DeepSeek-R1 and their kin)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trio_llm.server.parsing.pieces import Content, Piece, Reasoning, split_at

OPEN, CLOSE = "<think>", "</think>"
_STRIDE_TOKENS = 64


class ReasoningParser:
    """Splits one message. Thinking comes first or not at all; a later <think> is text like any other.

    Args:
        inside: The prompt already opened the thinking, as some templates do.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self._held = ""
        self._state = "lead" if inside else "start"

    def feed(self, text: str) -> list[Piece]:
        """Take in more text and return what it certainly is."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._open()
        if self._state == "lead":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "reasoning"
        if self._state == "reasoning":
            before, marker, self._held = split_at(self._held, [CLOSE])
            if before:
                pieces.append(Reasoning(before))
            if marker:
                self._state = "gap"
        if self._state == "gap":
            # Models put line breaks round their thinking; they belong to neither it nor the answer.
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "content"
        if self._state == "content" and self._held:
            pieces.append(Content(self._held))
            self._held = ""
        return pieces

    def finish(self) -> list[Piece]:
        """Return what was held back when the text has ended."""
        held, self._held = self._held, ""
        if not held or self._state in ("lead", "gap"):
            return []
        return [Reasoning(held) if self._state == "reasoning" else Content(held)]

    def _open(self) -> None:
        stripped = self._held.lstrip()
        if stripped.startswith(OPEN):
            self._held = stripped[len(OPEN) :]
            self._state = "lead"
        elif not OPEN.startswith(stripped):
            self._state = "content"


def count_reasoning_tokens(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]) -> int:
    """Count an output's tokens up to the one that ends its thinking, that one included; all where none does.

    Args:
        decode: Turns ids into text, control tokens included.
    """
    before = len(CLOSE)  # Tokens that the marker may be spread over.
    for start in range(0, len(token_ids), _STRIDE_TOKENS):
        end = start + _STRIDE_TOKENS
        if CLOSE in decode(token_ids[max(0, start - before) : end]):
            ends = range(start + 1, min(end, len(token_ids)) + 1)
            return next((at for at in ends if CLOSE in decode(token_ids[max(0, at - before - 1) : at])), ends[-1])
    return len(token_ids)
