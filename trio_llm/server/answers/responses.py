"""Answers of /v1/responses: OpenAI's response object, and the events of a streamed one."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from trio_llm.server.answers.base import Answer, ReasoningTokens

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class PromptTokens(Answer, kw_only=True):
    """How much of the prompt came from the prefix cache.

    Attributes:
        cached_tokens: Prompt tokens that were not computed again.
        cache_write_tokens: Always 0: every prompt is cached, at no cost.
    """

    cached_tokens: int
    cache_write_tokens: int = 0


class ResponseUsage(Answer, kw_only=True):
    """Tokens of a response.

    Attributes:
        input_tokens: Tokens of the prompt.
        input_tokens_details: The cached part of them.
        output_tokens: Tokens of the answer.
        output_tokens_details: The part of them that was reasoning.
        total_tokens: Input and output tokens.
    """

    input_tokens: int
    input_tokens_details: PromptTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class OutputPart(Answer, kw_only=True):
    """Text of an item.

    Attributes:
        type: What the text is.
        text: The text.
        annotations: Of output text, always empty.
        logprobs: Of output text, always empty.
    """

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[None] | UnsetType = UNSET
    logprobs: list[None] | UnsetType = UNSET


class OutputItem(Answer, kw_only=True):
    """A message, a call, or reasoning; which fields it has depends on its type.

    Attributes:
        id: New for each item.
        type: What the item is.
        status: Whether it is complete.
        call_id: Of a call, its name, to give back with its output.
        name: Of a call, the tool.
        namespace: Of a call, the tool's namespace.
        arguments: Of a function's call, the text of a JSON object.
        input: Of a custom tool's call, its text.
        role: Of a message, always "assistant".
        summary: Of reasoning, always empty: the reasoning itself is in `content`.
        content: Of a message or reasoning, its text.
    """

    id: str
    type: Literal["message", "function_call", "custom_tool_call", "reasoning"]
    status: ItemStatus
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    namespace: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    input: str | UnsetType = UNSET
    role: Literal["assistant"] | UnsetType = UNSET
    summary: list[None] | UnsetType = UNSET
    content: list[OutputPart] | UnsetType = UNSET


class IncompleteDetails(Answer, kw_only=True):
    """Why a response is incomplete.

    Attributes:
        reason: Always "max_output_tokens".
    """

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseFault(Answer, kw_only=True):
    """Why a response failed.

    Attributes:
        code: Always "server_error".
        message: What happened.
    """

    code: Literal["server_error"] = "server_error"
    message: str


class UsedReasoning(Answer, kw_only=True):
    """How much the model was asked to think.

    Attributes:
        effort: As the request says.
        summary: Always null.
    """

    effort: str | None
    summary: None = None


class ModelResponse(Answer, kw_only=True):
    """A response in OpenAI's newer form; it says back what it was asked by.

    Attributes:
        id: New for each response; nothing is found by it.
        object: Type of the object.
        created_at: Unix time at which the request arrived, in seconds.
        completed_at: Unix time at which the response was complete; null before that, and if it was not completed.
        status: Whether it is complete.
        background: Always false.
        error: Why it failed.
        incomplete_details: Why it is incomplete.
        instructions: As the request says.
        max_output_tokens: As the request says.
        max_tool_calls: Always null: the server runs no tools.
        metadata: As the request says.
        model: Served name of the model.
        output: What the model thinks, says and calls, in order.
        parallel_tool_calls: Whether it may ask for several calls.
        presence_penalty: The penalty that was used.
        frequency_penalty: The penalty that was used.
        previous_response_id: Always null.
        prompt_cache_key: As the request says.
        reasoning: How much the model was asked to think.
        safety_identifier: As the request says.
        service_tier: Always "default".
        store: Always false.
        temperature: The temperature that was used.
        text: The form of the answer.
        tool_choice: As the request says.
        tools: The tools that were offered to the model.
        top_logprobs: Always 0.
        top_p: The value that was used.
        truncation: As the request says.
        usage: Tokens of the response; null until it is complete.
        user: As the request says.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: ResponseStatus
    background: Literal[False] = False
    error: ResponseFault | None = None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    presence_penalty: float
    frequency_penalty: float
    previous_response_id: None = None
    prompt_cache_key: str | None
    reasoning: UsedReasoning
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: Literal[0] = 0
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None


class ResponseEvent(Answer, kw_only=True):
    """The state of the response changes.

    Attributes:
        type: Name of the event.
        response: The response as it stands.
        sequence_number: Number of the event in its stream, from 0.
    """

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: ModelResponse
    sequence_number: int = 0


class ItemEvent(Answer, kw_only=True):
    """An item begins or is complete.

    Attributes:
        type: Name of the event.
        output_index: Which item of the output.
        item: The item as it stands.
        sequence_number: Number of the event in its stream, from 0.
    """

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem
    sequence_number: int = 0


class PartEvent(Answer, kw_only=True):
    """The text of an item begins or is complete.

    Attributes:
        type: Name of the event.
        item_id: Id of the item.
        output_index: Which item of the output.
        content_index: Always 0.
        part: The text as it stands.
        sequence_number: Number of the event in its stream, from 0.
    """

    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int
    content_index: Literal[0] = 0
    part: OutputPart
    sequence_number: int = 0


class TextEvent(Answer, kw_only=True):
    """Text of an item, or the arguments of a call, grows or is complete.

    Attributes:
        type: Name of the event.
        item_id: Id of the item.
        output_index: Which item of the output.
        content_index: Of text, always 0.
        delta: What was added.
        text: At the end, the whole text.
        name: At the end of a call, the function.
        arguments: At the end of a function's call, its arguments.
        input: At the end of a custom tool's call, its text.
        logprobs: Of output text, always empty.
        sequence_number: Number of the event in its stream, from 0.
    """

    type: Literal[
        "response.output_text.delta", "response.output_text.done",
        "response.reasoning_text.delta", "response.reasoning_text.done",
        "response.function_call_arguments.delta", "response.function_call_arguments.done",
        "response.custom_tool_call_input.delta", "response.custom_tool_call_input.done",
    ]  # fmt: skip
    item_id: str
    output_index: int
    content_index: Literal[0] | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    input: str | UnsetType = UNSET
    logprobs: list[None] | UnsetType = UNSET
    sequence_number: int = 0


Event = ResponseEvent | ItemEvent | PartEvent | TextEvent
