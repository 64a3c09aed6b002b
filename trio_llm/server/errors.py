"""The error object of every path: OpenAI's, and Anthropic's under /v1/messages."""

from __future__ import annotations

import math

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
    StorageError,
)
from trio_llm.server.answers.errors import AnthropicError, AnthropicErrorDetails, Error, ErrorDetails

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
    504: "timeout_error",
    507: "insufficient_storage_error",
}
_ANTHROPIC_ROOT = "/v1/messages"
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


def _encodable(text: str) -> str:
    """Return `text` with lone surrogates, which an error may quote from a request, as escapes."""
    return text.encode(errors="backslashreplace").decode()


@attrs.define(eq=False)
class HttpError(Exception):
    """An error of the HTTP layer. The client gets its message."""

    status: int
    message: str = attrs.field(converter=_encodable)
    param: str | None = attrs.field(default=None, converter=attrs.converters.optional(_encodable))
    code: str | None = None
    headers: dict[str, str] = attrs.field(factory=dict[str, str])

    def __str__(self) -> str:
        return self.message


def to_http_error(error: BaseException) -> HttpError:
    """Return the client's error for `error`; for an unexpected one it has no details."""
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
        case StorageError() if error.disk_full:
            return HttpError(507, error.message, code="disk_full")
        case StorageError():
            return HttpError(503, error.message, code="storage_failed", headers=retry_after(5.0))
        case RequestFailedError():
            return HttpError(500, error.message, code="request_failed")
        case _:
            return HttpError(500, "The server failed on this request; its log has the details.")


def retry_after(seconds: float) -> dict[str, str]:
    """Return the headers with the time of a retry; openai-python reads the finer one first."""
    return {"Retry-After": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}


def error_object(error: HttpError) -> Error:
    """Return OpenAI's `{"error": {...}}`."""
    kind = _TYPES.get(error.status, "invalid_request_error")
    return Error(error=ErrorDetails(message=error.message, type=kind, param=error.param, code=error.code))


def anthropic_error_object(error: HttpError) -> AnthropicError:
    """Return Anthropic's `{"type": "error", ...}`; only the message can name the field."""
    unnamed = error.param is not None and error.param not in error.message
    message = f"{error.param}: {error.message}" if unnamed else error.message
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
    return AnthropicError(error=AnthropicErrorDetails(type=kind, message=message))


def error_body(error: HttpError, path: str = "") -> bytes:
    """Return the error object as JSON, in the form of the API at `path`."""
    is_anthropic = path == _ANTHROPIC_ROOT or path.startswith(f"{_ANTHROPIC_ROOT}/")
    return msgspec.json.encode((anthropic_error_object if is_anthropic else error_object)(error))
