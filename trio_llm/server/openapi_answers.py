"""What the endpoints answer, as types: only the document is made from them, and tests hold the answers to it.

Files and batches are in openapi_stored.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

_FinishReason = Literal["stop", "length", "repetition", "abort", "tool_calls"]


class Answer(Struct, kw_only=True, forbid_unknown_fields=True):
    """An object with these fields and no others."""


class CachedTokens(Answer, kw_only=True):
    """How much of the prompt came from the prefix cache."""

    cached_tokens: int


class TokenUsage(Answer, kw_only=True):
    """What a request has cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Position(Answer, kw_only=True):
    """A token as prompt_logprobs tells of it, under its id."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, Position] | None]


class CompletionColumns(Answer, kw_only=True):
    """Log-probabilities of a completion; the columns are equally long."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Answer, kw_only=True):
    """One sample, or in a stream what was added to it."""

    index: int
    text: str
    logprobs: CompletionColumns | None
    finish_reason: _FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Answer, kw_only=True):
    """A completion, whole or a chunk of a stream; of a stream's chunks only the last has its usage."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: TokenUsage | None = None


class TokenProbability(Answer, kw_only=True):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(TokenProbability, kw_only=True):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TokenProbability]


class ChatLogprobs(Answer, kw_only=True):
    """Log-probabilities of a chat answer."""

    content: list[ChosenToken] | None
    refusal: None


class MadeFunction(Answer, kw_only=True):
    """A function's name and its arguments, which are JSON in a text; in a stream in parts."""

    arguments: str
    name: str | None = None


class MadeCall(Answer, kw_only=True):
    """A call that the model asks for; `index` says in a stream which one a part belongs to."""

    function: MadeFunction
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None


class AssistantMessage(Answer, kw_only=True):
    """What the model says, or in a stream what was added to it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[MadeCall] | None = None


class _ChatChoice(Answer, kw_only=True):
    index: int
    logprobs: ChatLogprobs | None
    finish_reason: _FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChoice(_ChatChoice, kw_only=True):
    """One sample."""

    message: AssistantMessage


class ChatChunkChoice(_ChatChoice, kw_only=True):
    """What was added to a sample."""

    delta: AssistantMessage


class _Chat(Answer, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None


class ChatCompletion(_Chat, kw_only=True):
    """A chat answer."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: TokenUsage
    prompt_logprobs: PromptLogprobs | None = None


class ChatCompletionChunk(_Chat, kw_only=True):
    """A chunk of a streamed chat answer; without choices it has the usage of all."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: TokenUsage | None = None


class PromptUsage(Answer, kw_only=True):
    """What vectors have cost."""

    prompt_tokens: int
    total_tokens: int


class Vector(Answer, kw_only=True):
    """A vector, or in base64 its float32 in little-endian order."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Answer, kw_only=True):
    """Vectors in the order of their inputs."""

    id: str
    object: Literal["list"]
    model: str
    data: list[Vector]
    usage: PromptUsage


class Tokenized(Answer, kw_only=True):
    """The tokens of a text or conversation."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer, kw_only=True):
    """The text of tokens."""

    prompt: str


class Model(Answer, kw_only=True):
    """A name that the model answers to."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    permission: list[Any]


class Models(Answer, kw_only=True):
    """All of its names."""

    object: Literal["list"]
    data: list[Model]


class Status(Answer, kw_only=True):
    """How the server is."""

    status: Literal["ok", "stalled", "draining", "dead"]


class Load(Answer, kw_only=True):
    """How many sequences run and wait."""

    server_load: int


class Version(Answer, kw_only=True):
    """Which version this is."""

    version: str


class TokenCount(Answer, kw_only=True):
    """What a message would cost."""

    input_tokens: int


class MessageUsage(Struct, kw_only=True):
    """What a message has cost, in Anthropic's words."""

    input_tokens: int
    output_tokens: int


class AnthropicMessage(Struct, kw_only=True):
    """A message in Anthropic's form."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class ReasoningTokens(Answer, kw_only=True):
    """How much of the answers was reasoning."""

    reasoning_tokens: int


class PromptTokens(Answer, kw_only=True):
    """How much of the prompt came from the prefix cache; nobody pays for writing it."""

    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(Answer, kw_only=True):
    """What a response has cost."""

    input_tokens: int
    input_tokens_details: PromptTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ModelResponse(Struct, kw_only=True):
    """A response in OpenAI's newer form."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[dict[str, Any]]
    store: Literal[False]
    usage: ResponseUsage | None
