"""What a request that fails is answered, as OpenAI and as Anthropic spell it."""

from __future__ import annotations

from typing import Literal

from trio_llm.server.answers.base import Answer


class ErrorDetails(Answer, kw_only=True):
    """What is wrong.

    Attributes:
        message: In words, with what would be right.
        type: Kind of the error.
        param: The field that is wrong.
        code: Name of the error, for programs.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer, kw_only=True):
    """What every request that fails is answered, but under /v1/messages.

    Attributes:
        error: What is wrong.
    """

    error: ErrorDetails


class AnthropicErrorDetails(Answer, kw_only=True):
    """What is wrong.

    Attributes:
        type: Kind of the error.
        message: In words, with the field that is wrong and what would be right.
    """

    type: str
    message: str


class AnthropicError(Answer, kw_only=True):
    """What every request under /v1/messages that fails is answered; also the last event of a stream that fails.

    Attributes:
        type: Always "error".
        error: What is wrong.
    """

    type: Literal["error"] = "error"
    error: AnthropicErrorDetails
