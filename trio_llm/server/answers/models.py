"""Answers about models, tokens, vectors and the server itself."""

from __future__ import annotations

from typing import Literal

import msgspec

from trio_llm.server.answers.base import Answer


class PromptUsage(Answer, kw_only=True):
    """Tokens of an embedding request.

    Attributes:
        prompt_tokens: Tokens of all inputs.
        total_tokens: The same.
    """

    prompt_tokens: int
    total_tokens: int


class Vector(Answer, kw_only=True):
    """The vector of one input.

    Attributes:
        object: Type of the object.
        index: Which input.
        embedding: Its numbers; with `encoding_format: base64`, as little-endian float32 in base64.
    """

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(Answer, kw_only=True):
    """Vectors in the order of their inputs.

    Attributes:
        id: New for each request.
        object: Type of the object.
        model: Served name of the model.
        data: One vector per input.
        usage: Tokens of the request.
    """

    id: str
    object: Literal["list"] = "list"
    model: str
    data: list[Vector]
    usage: PromptUsage


class Tokenized(Answer, kw_only=True):
    """The tokens of a text or conversation.

    Attributes:
        count: How many there are.
        max_model_len: How many the model can take, answer included.
        tokens: Their ids.
        token_strs: With `return_token_strs`, how the vocabulary spells them.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class Detokenized(Answer, kw_only=True):
    """The text of tokens.

    Attributes:
        prompt: The text, control tokens included.
    """

    prompt: str


class Model(Answer, kw_only=True):
    """A name that the model is served under.

    Attributes:
        id: The name.
        object: Type of the object.
        created: Unix time at which the server started, in seconds.
        owned_by: Always "trio-llm".
        root: The first of the served names.
        parent: Always null.
        max_model_len: Tokens that prompt and answer may have together.
        permission: Always empty.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["trio-llm"] = "trio-llm"
    root: str
    parent: None = None
    max_model_len: int
    permission: list[None] = msgspec.field(default_factory=list[None])


class Models(Answer, kw_only=True):
    """All names that the model is served under.

    Attributes:
        object: Type of the object.
        data: One entry per name.
    """

    object: Literal["list"] = "list"
    data: list[Model]


class Status(Answer, kw_only=True):
    """State of the server.

    Attributes:
        status: "ok": requests are served; "degraded": a background task keeps failing; "stalled": the model has not
            answered for a while; "failing": every request fails; "draining": the server is ending; "dead": the engine
            has failed.
    """

    status: Literal["ok", "degraded", "stalled", "failing", "draining", "dead"]


class Load(Answer, kw_only=True):
    """Load of the server.

    Attributes:
        server_load: Requests under way.
    """

    server_load: int


class Version(Answer, kw_only=True):
    """Version of the server.

    Attributes:
        version: Version of the package.
    """

    version: str
