"""The errors that users can meet (floor 0).

Each has the data that its reader needs: the field, the value, what is allowed. So the server can build an OpenAI error
object, and the command line one clear line, without parsing text. What a user, a client or a file can cause is one of
these errors; `assert` is for invariants of this project.
"""

import reprlib

import attrs


class _BoundedRepr(reprlib.Repr):
    """Shows any value in an error message: cut where it is long, nested deeply or refers to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200
        self.maxlist = self.maxtuple = self.maxdict = 8

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002 - reprlib calls it with both
        # Python refuses to write integers of more than 4,300 digits.
        return repr(x) if x.bit_length() <= 256 else f"<an integer of {x.bit_length()} bits>"


_BOUNDED = _BoundedRepr()


class TrioLLMError(Exception):
    """Base class of the errors that trio-llm raises on purpose."""


@attrs.define(eq=False)
class InvalidRequestError(TrioLLMError):
    """A request that can never be served: HTTP 400."""

    message: str
    param: str | None = None
    code: str | None = None

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class ModelNotFoundError(TrioLLMError):
    """A request for a model that is not served here: HTTP 404."""

    model: str
    served: tuple[str, ...]

    def __str__(self) -> str:
        return f"The model `{self.model}` does not exist. Served: {', '.join(self.served)}."


@attrs.define(eq=False)
class OverloadedError(TrioLLMError):
    """The queue is full: HTTP 503 with Retry-After."""

    message: str
    retry_after_s: float = 1.0

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class DrainingError(TrioLLMError):
    """The engine is shutting down and admits no request: HTTP 503."""

    message: str = "The server is shutting down."

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class EngineDeadError(TrioLLMError):
    """An actor failed. Every open request ends with this error, and the process exits: HTTP 503."""

    message: str = "The engine stopped because of an internal error."

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class StorageError(TrioLLMError):
    """The data directory cannot be read or written: HTTP 507 where its disk is full, else 503."""

    message: str
    disk_full: bool

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class RequestFailedError(TrioLLMError):
    """The step failed for this request only: HTTP 500."""

    message: str

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class ConfigError(TrioLLMError):
    """A setting is unknown or not valid. Names the key, the value and its source."""

    key: str
    value: object
    source: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.source}: {self.key} = {_BOUNDED.repr(self.value)}: {self.allowed}"


@attrs.define(eq=False)
class CheckpointError(TrioLLMError):
    """A model directory cannot be loaded. Names the file or tensor, what was found and what was expected."""

    message: str

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class UnsupportedError(TrioLLMError):
    """A feature is not implemented (a model family, a quantization, a device)."""

    message: str

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class OutOfOrderError(TrioLLMError):
    """A verb of a step that was called out of order, or with something else than the verb before it returned."""

    called: str
    why: str
    expected: str

    def __str__(self) -> str:
        return f"{self.called}: {self.why}. Expected next: {self.expected}."


@attrs.define(eq=False)
class RecordError(TrioLLMError):
    """A record cannot be written, read or replayed. Names the file where there is one."""

    message: str

    def __str__(self) -> str:
        return self.message
