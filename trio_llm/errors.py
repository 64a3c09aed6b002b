"""Every error a user can meet (floor 0).

Each carries the data its reader needs (the field, the value, what is allowed), so that the server can
build an OpenAI error object and the command line one clear line, without parsing text. An `assert`
is for invariants of ours; whatever a user, a client or a file can cause is one of these.
"""

import attrs


class TrioLLMError(Exception):
    """Anything trio-llm raises on purpose."""


@attrs.define(eq=False)
class InvalidRequestError(TrioLLMError):
    """A request that can never be served as it stands: HTTP 400."""

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
    """The queue is full: HTTP 503 with Retry-After, at once."""

    message: str
    retry_after_s: float = 1.0

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class DrainingError(TrioLLMError):
    """The engine no longer admits requests because it is shutting down: HTTP 503."""

    message: str = "The server is shutting down."

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class EngineDeadError(TrioLLMError):
    """An actor died; every open request ends with this and the process exits: HTTP 503."""

    message: str = "The engine stopped because of an internal error."

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class RequestFailedError(TrioLLMError):
    """The step failed for this one request; the others went on: HTTP 500."""

    message: str

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class ConfigError(TrioLLMError):
    """A setting that is unknown or does not parse; names the key, the value and where it came from."""

    key: str
    value: object
    source: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.source}: {self.key} = {self.value!r}: {self.allowed}"


@attrs.define(eq=False)
class CheckpointError(TrioLLMError):
    """A model directory that cannot be loaded; names the file or tensor, what was found and what was expected."""

    message: str

    def __str__(self) -> str:
        return self.message


@attrs.define(eq=False)
class UnsupportedError(TrioLLMError):
    """Something that exists elsewhere but not here (a model family, a quantisation, a device)."""

    message: str

    def __str__(self) -> str:
        return self.message
