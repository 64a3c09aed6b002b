"""From token ids to text that may be shown: detokenising and stop strings of one request (pure, synchronous)."""

from __future__ import annotations


class OutputText:
    """The text of one request's output; runs in the client's task, so a bad tokenizer call hurts one request only."""
