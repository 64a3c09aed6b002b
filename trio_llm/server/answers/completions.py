"""Answers of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from trio_llm.server.answers.base import Answer, FinishReason, TokenUsage
from trio_llm.server.answers.requests import PromptProgress, Timings


class Position(Answer, kw_only=True):
    """A token in `prompt_logprobs`, under its id.

    Attributes:
        logprob: Log-probability of the token at this position; -9999 for minus infinity.
        rank: 1 for the likeliest token.
        decoded_token: Text of the token.
    """

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, Position] | None]


class CompletionColumns(Answer, kw_only=True):
    """Log-probabilities of a completion, as columns of equal length.

    Attributes:
        text_offset: Per token, where its text begins, in characters.
        tokens: Texts of the tokens; "bytes:..." for a part of a character.
        token_logprobs: Per token, its log-probability; null for the first token of an echoed prompt.
        top_logprobs: Per token, the likeliest tokens in its place with their log-probabilities.
    """

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Answer, kw_only=True):
    """One sample, or in a stream what was added to it.

    Attributes:
        index: Which sample: those of the first prompt come first.
        text: Generated text; with `echo` it begins with the prompt.
        logprobs: With `logprobs`, the log-probabilities of its tokens.
        finish_reason: Why it ended; null in a stream until it has.
        stop_reason: The stop string or stop token that ended it; null for the end token.
        token_ids: With `return_token_ids`, its tokens.
        prompt_token_ids: With `return_token_ids`, the tokens of its prompt.
        prompt_text: With `return_prompt_text`, its prompt as the model sees it.
        prompt_logprobs: With `prompt_logprobs`, per position of the prompt token id -> log-probability.
    """

    index: int
    text: str
    logprobs: CompletionColumns | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class AnswerHead(Answer, kw_only=True):
    """The fields that are equal in every chunk of an answer.

    Attributes:
        id: New for each request, or the request's `request_id`.
        created: Unix time, in seconds.
        model: Served name of the model.
        system_fingerprint: Name and version of the server.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(AnswerHead, kw_only=True):
    """A completion, whole or a chunk of a stream.

    Attributes:
        object: Type of the object.
        choices: The samples.
        usage: Tokens of the request; in a stream, with `include_usage`, of the last chunk.
        timings: With `timings_per_token`, tokens and times so far.
        prompt_progress: With `return_progress`, how far the prompt is; only in chunks before the first token.
    """

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: TokenUsage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET


class TokenProbability(Answer, kw_only=True):
    """A token and how likely it was.

    Attributes:
        token: Text of the token; "bytes:..." for a part of a character.
        logprob: Its log-probability; -9999 for minus infinity.
        bytes: UTF-8 bytes of its text.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(TokenProbability, kw_only=True):
    """A token of the answer.

    Attributes:
        top_logprobs: The likeliest tokens in its place.
    """

    top_logprobs: list[TokenProbability]


class ChatLogprobs(Answer, kw_only=True):
    """Log-probabilities of a chat answer.

    Attributes:
        content: One entry per token of the answer.
        refusal: Always null.
    """

    content: list[ChosenToken] | None
    refusal: None = None


class MadeFunction(Answer, kw_only=True):
    """A function that the model calls.

    Attributes:
        name: Name of the function; in a stream only in the first part of a call.
        arguments: Text of a JSON object; in a stream a part of it.
    """

    name: str | UnsetType = UNSET
    arguments: str


class MadeInput(Answer, kw_only=True):
    """A custom tool that the model calls.

    Attributes:
        name: Name of the tool; in a stream only in the first part of a call.
        input: The text for it; a stream sends it whole, when it is complete.
    """

    name: str | UnsetType = UNSET
    input: str


class MadeCall(Answer, kw_only=True):
    """A call that the model asks for, or in a stream a part of one.

    Attributes:
        index: In a stream, which call of the message a part belongs to.
        id: Name of the call, to give back as `tool_call_id` with its result.
        type: Kind of the tool.
        function: Which function is called with which arguments, for type "function".
        custom: Which custom tool is called with which text, for type "custom".
    """

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function", "custom"] | UnsetType = UNSET
    function: MadeFunction | UnsetType = UNSET
    custom: MadeInput | UnsetType = UNSET


class AssistantMessage(Answer, kw_only=True):
    """What the model says, or in a stream what was added to it.

    Attributes:
        role: Always "assistant"; in a stream only in the first chunk.
        content: Text of the answer; null for a message of calls alone.
        refusal: Always null.
        annotations: Always empty.
        reasoning: Text of the thinking before the answer.
        reasoning_content: The same; clients know it by one or the other name.
        tool_calls: Calls that the model asks for.
    """

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: UnsetType | None = UNSET
    annotations: list[None] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[MadeCall] | UnsetType = UNSET


class ChatSample(Answer, kw_only=True):
    """What a sample has in a whole answer and in a chunk.

    Attributes:
        index: Which sample.
        logprobs: With `logprobs`, the log-probabilities of its tokens; in a stream, of the added ones.
        finish_reason: Why it ended; null in a stream until it has.
        stop_reason: The stop string or stop token that ended it; null for the end token.
        token_ids: With `return_token_ids`, its tokens; in a stream, the added ones.
    """

    index: int
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChoice(ChatSample, kw_only=True):
    """One sample.

    Attributes:
        message: What the model says.
    """

    message: AssistantMessage


class ChatChunkChoice(ChatSample, kw_only=True):
    """What was added to a sample.

    Attributes:
        delta: What was added to the message.
    """

    delta: AssistantMessage


class ChatCompletion(AnswerHead, kw_only=True):
    """A chat answer.

    Attributes:
        object: Type of the object.
        choices: The samples.
        usage: Tokens of the request.
        timings: With `timings_per_token`, tokens and times.
        prompt_logprobs: With `prompt_logprobs`, per position of the prompt token id -> log-probability.
        prompt_token_ids: With `return_token_ids`, the tokens of the prompt.
        prompt_text: With `return_prompt_text`, the prompt as the model sees it.
    """

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: TokenUsage
    timings: Timings | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET


class ChatCompletionChunk(AnswerHead, kw_only=True):
    """A chunk of a streamed chat answer; the last one has no choices but the usage, with `include_usage`.

    Attributes:
        object: Type of the object.
        choices: What was added to samples.
        usage: Tokens of the request, in the last chunk; with `continuous_usage_stats`, the tokens so far.
        timings: With `timings_per_token`, tokens and times so far.
        prompt_progress: With `return_progress`, how far the prompt is; only in chunks before the first token.
        prompt_token_ids: With `return_token_ids`, the tokens of the prompt, in the first chunk of a sample.
        prompt_text: With `return_prompt_text`, the prompt as the model sees it, in the first chunk of a sample.
    """

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: TokenUsage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET
