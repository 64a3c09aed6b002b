"""One shape for every error on every path: OpenAI's error object, and Anthropic's where its API is spoken."""

from __future__ import annotations

import math
from typing import Any

import attrs
import msgspec
import trio

from trio_llm.errors import (
    DrainingError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestFailedError,
)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_ANTHROPIC_PATHS = frozenset({"/v1/messages", "/v1/messages/count_tokens"})
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@attrs.define(eq=False)
class HttpError(Exception):
    """A refusal that is about HTTP and not about the engine; its message is shown to the client."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = attrs.field(factory=dict[str, str])

    def __str__(self) -> str:
        return self.message


def to_http_error(error: BaseException) -> HttpError:
    """Say what a client is told of `error`; of an unexpected one, only that it happened."""
    match error:
        case HttpError():
            return error
        case InvalidRequestError():
            return HttpError(400, error.message, param=error.param, code=error.code)
        case ModelNotFoundError():
            return HttpError(404, str(error), param="model", code="model_not_found")
        case OverloadedError():
            return HttpError(503, error.message, code="overloaded", headers=retry_after(error.retry_after_s))
        case (
            DrainingError() | trio.ClosedResourceError()
        ):  # The latter: its stream was closed when draining took too long.
            return HttpError(503, DrainingError().message, code="draining", headers=retry_after(5.0))
        case EngineDeadError():
            return HttpError(503, error.message, code="engine_dead", headers=retry_after(5.0))
        case RequestFailedError():
            return HttpError(500, error.message, code="request_failed")
        case _:
            return HttpError(500, "The server failed on this request; its log has the details.")


def retry_after(seconds: float) -> dict[str, str]:
    """Return the headers by which clients know when to come back; openai-python reads the finer one first."""
    return {"Retry-After": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}


def error_object(error: HttpError) -> dict[str, Any]:
    """Return `{"error": {...}}` as OpenAI spells it."""
    kind = _TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_error_object(error: HttpError) -> dict[str, Any]:
    """Return `{"type": "error", ...}` as Anthropic spells it; it has no place for the field but the message."""
    unnamed = error.param is not None and error.param not in error.message
    message = f"{error.param}: {error.message}" if unnamed else error.message
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_body(error: HttpError, path: str = "") -> bytes:
    """Return the error object as JSON, in the shape that clients of `path` know."""
    return msgspec.json.encode((anthropic_error_object if path in _ANTHROPIC_PATHS else error_object)(error))
