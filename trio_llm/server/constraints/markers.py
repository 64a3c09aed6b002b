"""Markers of the parts of an answer (<tool_call>, </think>) in grammars, and the bound of its calls."""

from __future__ import annotations

import json
from collections.abc import Mapping

MAX_CALLS = 32
"""Maximum of calls in a constrained answer. Without a bound a weak model may call until the context is full."""
FURTHER_CALLS = f"{{0,{MAX_CALLS - 1}}}"
"""How often a grammar repeats its rule for the calls behind the first one."""


class Markers:
    """Spells markers for a grammar: added tokens by id, others as text.

    Args:
        added_tokens: Literal -> id.
    """

    def __init__(self, added_tokens: Mapping[str, int]) -> None:
        self._added_tokens = added_tokens

    def is_token(self, marker: str) -> bool:
        """Say whether a marker is one token."""
        return marker in self._added_tokens

    def __call__(self, marker: str) -> str:
        token_id = self._added_tokens.get(marker)
        return json.dumps(marker) if token_id is None else f"<[{token_id}]>"

    def after(self, text: str, marker: str) -> list[str]:
        """Return the rule `opening`: text of the given kind, up to and with the marker."""
        if marker in self._added_tokens:
            return [f"opening: {text} {self(marker)}"]
        return [f"opening[lazy]: {text} {self(marker)}"]
