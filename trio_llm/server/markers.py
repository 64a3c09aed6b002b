"""Words that models put round the parts of an answer (<tool_call>, </think>), as grammars spell them."""

from __future__ import annotations

import json
from collections.abc import Mapping


class Markers:
    """Spells markers for a grammar: control tokens by id, others as text.

    Args:
        special_tokens: Literal -> id.
    """

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._special_tokens = special_tokens

    def __call__(self, marker: str) -> str:
        token_id = self._special_tokens.get(marker)
        return json.dumps(marker) if token_id is None else f"<[{token_id}]>"

    def after(self, text: str, marker: str) -> list[str]:
        """Return the rule `opening`: text of the given kind, up to and with the marker."""
        if marker in self._special_tokens:
            return [f"opening: {text} {self(marker)}"]
        return [f"opening[lazy]: {text} {self(marker)}"]
