"""What all answers have in common."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

FinishReason = Literal["stop", "length", "repetition", "abort", "tool_calls"]


class Answer(Struct, kw_only=True, forbid_unknown_fields=True):
    """An object with these fields and no others; a field that is UNSET is left out."""


class CachedTokens(Answer, kw_only=True):
    """How much of the prompt came from the prefix cache.

    Attributes:
        cached_tokens: Prompt tokens that were not computed again.
    """

    cached_tokens: int


class TokenUsage(Answer, kw_only=True):
    """Tokens of a request.

    Attributes:
        prompt_tokens: Tokens of all prompts; a prompt counts once, however many samples it has.
        completion_tokens: Tokens of all answers.
        total_tokens: The sum of both.
        prompt_tokens_details: The cached part of the prompts.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ReasoningTokens(Answer, kw_only=True):
    """How much of the answer was reasoning.

    Attributes:
        reasoning_tokens: Output tokens up to the end of the thinking.
    """

    reasoning_tokens: int
