"""The body of POST /v1/responses, and the conversation that it is to a chat model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from msgspec import Meta, Struct

from trio_llm.errors import InvalidRequestError
from trio_llm.server.conversation import call_arguments
from trio_llm.server.fields import NotSupported
from trio_llm.server.requests import CalledFunction, ContentPart, Effort, Message, Metadata, ToolCall

T = TypeVar("T")

Role = Literal["user", "assistant", "system", "developer"]
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class InputPart(Struct, kw_only=True):
    """A piece of an item; text is the only kind.

    What a client hands back with an earlier answer's text (`annotations`, `logprobs`) was for it, not for the model.
    """

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class InputItem(Struct, kw_only=True):
    """A turn of the conversation, or a part of one; which fields it has depends on its type.

    `id` and `status` come back with items of an earlier answer; nothing here is found by them.
    """

    not_supported: ClassVar[NotSupported] = {
        "phase": ("final_answer",),
        "namespace": (),
        "caller": ({"type": "direct"},),
        "async": (False,),
    }

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Role | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    id: str | None = None
    status: str | None = None
    encrypted_content: str | None = None


class FunctionTool(Struct, kw_only=True):
    """A function that the model may call."""

    not_supported: ClassVar[NotSupported] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Struct, kw_only=True):
    """tool_choice by name."""

    type: Literal["function"]
    name: str


class TextFormat(Struct, kw_only=True, omit_defaults=True, rename={"schema_": "schema"}):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(Struct, kw_only=True):
    """What the answer's text is like."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(Struct, kw_only=True):
    """How much the model thinks. It is told as it is: there are no summaries."""

    not_supported: ClassVar[NotSupported] = {"context": ("auto",), "mode": ("standard",)}

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesBody(Struct, kw_only=True):
    """POST /v1/responses. Nothing is stored: what refers to an earlier response is refused."""

    not_supported: ClassVar[NotSupported] = {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "stream_options": ({}, {"include_obfuscation": False}),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    include: list[str] | None = None
    # Names of the caller's own; they change nothing and are stored nowhere.
    metadata: Metadata | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    safety_identifier: Annotated[str, Meta(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Meta(max_length=512)] | None = None


def conversation(body: ResponsesBody) -> list[Message]:
    """Return the turns that the instructions and the input are.

    Raises:
        InvalidRequestError: An item lacks what its type needs, or holds something else than text; names its place.
    """
    turns = _Turns()
    if body.instructions is not None:
        turns.messages.append(Message(role="system", content=body.instructions))
    if isinstance(body.input, str):
        turns.messages.append(Message(role="user", content=body.input))
    else:
        for index, item in enumerate(body.input):
            turns.add(item, f"input[{index}]")
    if not turns.messages:
        raise InvalidRequestError("The input says nothing.", param="input")
    return turns.messages


class _Turns:
    """Puts items together into turns: what an assistant thought, said and called are items, but one turn."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._names: dict[str, str] = {}

    def add(self, item: InputItem, path: str) -> None:
        match item.type:
            case "message":
                parts = _texts(_needed(item.content, f"{path}.content"), f"{path}.content")
                role: Role = _needed(item.role, f"{path}.role")
                if role == "assistant":
                    turn = self._assistant(extends=lambda turn: not turn.content and not turn.tool_calls)
                    turn.content = parts
                else:
                    self.messages.append(Message(role=role, content=parts))
            case "reasoning":
                self._think(item, path)
            case "function_call":
                self._call(item, path)
            case "function_call_output":
                call_id = _needed(item.call_id, f"{path}.call_id")
                if call_id not in self._names:
                    raise InvalidRequestError(f"No call before it has the id {call_id[:64]!r}.", f"{path}.call_id")
                output = _texts(_needed(item.output, f"{path}.output"), f"{path}.output")
                turn = Message(role="tool", content=output, tool_call_id=call_id, name=self._names[call_id])
                self.messages.append(turn)

    def _think(self, item: InputItem, path: str) -> None:
        if item.encrypted_content is not None:
            raise InvalidRequestError("This server cannot read encrypted reasoning.", f"{path}.encrypted_content")
        told = "content" if item.content else "summary"
        text = "".join(part.text or "" for part in _texts(getattr(item, told) or [], f"{path}.{told}"))
        if text:
            self._assistant(extends=lambda _: False).reasoning_content = text

    def _call(self, item: InputItem, path: str) -> None:
        call_id, name = _needed(item.call_id, f"{path}.call_id"), _needed(item.name, f"{path}.name")
        arguments = call_arguments(item.arguments or "", f"{path}.arguments")
        turn = self._assistant(extends=lambda _: True)
        turn.tool_calls = [
            *(turn.tool_calls or []),
            ToolCall(id=call_id, function=CalledFunction(name=name, arguments=arguments)),
        ]
        self._names[call_id] = name

    def _assistant(self, *, extends: Callable[[Message], bool]) -> Message:
        """Return the assistant's turn that an item belongs to: the last one if it `extends` that, else a new one."""
        last = self.messages[-1] if self.messages else None
        if last is None or last.role != "assistant" or not extends(last):
            last = Message(role="assistant")
            self.messages.append(last)
        return last


def _texts(content: str | Sequence[InputPart], path: str) -> list[ContentPart]:
    if isinstance(content, str):
        return [ContentPart(type="text", text=content)]
    parts: list[ContentPart] = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if (
            part.type not in ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")
            or text is None
        ):
            where = f"{path}[{index}]"
            raise InvalidRequestError(f"'{where}': only text is supported.", param=where)
        parts.append(ContentPart(type="text", text=text))
    return parts


def _needed(value: T | None, path: str) -> T:
    if value is None:
        raise InvalidRequestError(f"Missing required parameter: '{path}'.", param=path)
    return value
