"""The body of POST /v1/responses, and the conversation that it is to a chat model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from msgspec import Meta, Struct

from trio_llm.errors import InvalidRequestError
from trio_llm.server.bodies.tools import MAX_TOOLS, CalledFunction, ToolCall
from trio_llm.server.bodies.types import ContentPart, Effort, Message, Metadata
from trio_llm.server.bodies.unknown_fields import Neutral
from trio_llm.server.openai.responses_tools import Tool, full_name
from trio_llm.server.parsing.custom_inputs import input_arguments

T = TypeVar("T")

Role = Literal["user", "assistant", "system", "developer"]


class InputPart(Struct, kw_only=True):
    """A piece of an item; text is the only kind.

    What a client hands back with an earlier answer's text (`annotations`, `logprobs`) was for it, not for the model.

    Attributes:
        type: Kind of the piece.
        text: The text.
        refusal: What an assistant said instead of an answer.
        annotations: Without effect.
        logprobs: Without effect.
        prompt_cache_breakpoint: Without effect: every prompt is cached.
    """

    text_types: ClassVar[frozenset[str]] = frozenset(
        {"input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"}
    )

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class InputItem(Struct, kw_only=True):
    """A turn of the conversation, or a part of one; which fields it has depends on its type.

    `id` and `status` come back with items of an earlier answer; nothing here is found by them. Encrypted reasoning is
    another server's, and so are web searches and lists of tools, which say nothing that the next turns do not: the
    model goes on without them.

    Attributes:
        type: What the item is.
        role: Of a message, who speaks; "developer" is the same as "system".
        content: Of a message, what is said; of reasoning, what was thought.
        call_id: Of a call or its output, the id of the call.
        name: Of a call, the tool.
        namespace: Of a call, the tool's namespace.
        arguments: Of a function's call, the text of a JSON object.
        input: Of a custom tool's call, its text.
        output: Of a call's output, what the tool returned.
        summary: Of reasoning without content, what was thought.
        id: Id in an earlier answer; without effect.
        status: Status in an earlier answer; without effect.
    """

    hints: ClassVar[Neutral] = {
        "phase": ("final_answer",), "encrypted_content": (), "action": (), "server_label": (), "tools": (), "error": ()
    }  # fmt: skip
    not_supported: ClassVar[Neutral] = {
        "caller": ({"type": "direct"},),
        "async": (False,),
    }

    type: Literal[
        "message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output", "reasoning",
        "web_search_call", "mcp_list_tools",
    ] = "message"  # fmt: skip
    role: Role | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    id: str | None = None
    status: str | None = None


class FunctionChoice(Struct, kw_only=True, tag_field="type", tag="function"):
    """tool_choice of the function that must be called.

    Attributes:
        name: Name of the function.
    """

    name: str


class CustomChoice(Struct, kw_only=True, tag_field="type", tag="custom"):
    """tool_choice of the custom tool that must be called.

    Attributes:
        name: Name of the tool.
    """

    name: str


class AllowedChoice(Struct, kw_only=True, tag_field="type", tag="allowed_tools"):
    """tool_choice of the only tools that may be called; the model is offered no others.

    Attributes:
        mode: "auto": as the model likes; "required": one of them must be called.
        tools: The tools, by name.
    """

    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice | CustomChoice], Meta(min_length=1, max_length=MAX_TOOLS)]


ToolChoice = Literal["none", "auto", "required"] | FunctionChoice | CustomChoice | AllowedChoice | None


class TextFormat(Struct, kw_only=True, omit_defaults=True, rename={"schema_": "schema"}):
    """The form of the answer.

    Attributes:
        type: "text" for free text, "json_object" for any JSON object, "json_schema" for a schema.
        name: Name of the form.
        schema: JSON schema that the answer follows.
        strict: Without effect: the schema always binds.
        description: Without effect.
    """

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(Struct, kw_only=True):
    """What the answer's text is like.

    Attributes:
        format: The form of the answer.
    """

    hints: ClassVar[Neutral] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ReasoningConfig(Struct, kw_only=True):
    """How much the model thinks. Its reasoning is returned as it is: "auto" is satisfied, other summaries are not.

    Attributes:
        effort: How much the model thinks, for templates that have a switch for it.
    """

    hints: ClassVar[Neutral] = {"summary": ("auto",), "generate_summary": ("auto",)}
    not_supported: ClassVar[Neutral] = {"context": ("auto",), "mode": ("standard",)}

    effort: Effort | None = None


class ResponsesBody(Struct, kw_only=True):
    """POST /v1/responses. Nothing is stored: what refers to an earlier response is refused.

    Attributes:
        model: Served name of the model; needed with `--strict` only.
        input: A text, or the items of a conversation.
        instructions: System prompt.
        max_output_tokens: Longest answer, in tokens; by default what is left of the context.
        temperature: Randomness of sampling; 0 takes the likeliest token. The default is the model's, else 1.
        top_p: Sample from the likeliest tokens whose probabilities add up to this.
        presence_penalty: Lower the logit of every token that the answer already has.
        frequency_penalty: Lower the logit of a token for each time that the answer has it.
        tools: Functions and custom tools that the model may call, also in namespaces.
        tool_choice: "none", "auto", "required", the tool that must be called, or the only ones that may be.
        parallel_tool_calls: Whether there may be more than one call; true by default.
        truncation: "auto" leaves the oldest turns out of a conversation that is too long; "disabled" refuses it.
        text: What the answer's text is like.
        reasoning: How much the model thinks.
        stream: Send the answer as server-sent events while it is generated.
        include: Further parts of the answer; only "reasoning.encrypted_content" is known, and reasoning comes in the
            clear.
        metadata: The caller's own pairs of names and values; they come back with the answer.
        client_metadata: The client's own data; without effect.
        user: Name of the caller's own; it comes back with the answer.
        safety_identifier: Name of the caller's own; it comes back with the answer.
        prompt_cache_key: Name of the caller's own; it comes back with the answer.
    """

    runnable_tools: ClassVar[frozenset[str]] = frozenset({"function", "custom", "namespace"})
    hints: ClassVar[Neutral] = {"context_management": ([],)}
    not_supported: ClassVar[Neutral] = {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "store": (False,),
        "stream_options": ({}, {"include_obfuscation": False}),
        "top_logprobs": (0,),
    }

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    include: list[str] | None = None
    # Names of the caller's own; they change nothing and are stored nowhere.
    metadata: Metadata | None = None
    client_metadata: dict[str, Any] | None = None
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
                self._call(item, path, item.arguments or "")
            case "custom_tool_call":
                self._call(item, path, input_arguments(_needed(item.input, f"{path}.input")))
            case "function_call_output" | "custom_tool_call_output":
                call_id = _needed(item.call_id, f"{path}.call_id")
                if call_id not in self._names:
                    raise InvalidRequestError(f"No call before it has the id {call_id[:64]!r}.", f"{path}.call_id")
                output = _texts(_needed(item.output, f"{path}.output"), f"{path}.output")
                turn = Message(role="tool", content=output, tool_call_id=call_id, name=self._names[call_id])
                self.messages.append(turn)
            case "web_search_call" | "mcp_list_tools":
                pass

    def _think(self, item: InputItem, path: str) -> None:
        field = "content" if item.content else "summary"
        text = "".join(part.text or "" for part in _texts(getattr(item, field) or [], f"{path}.{field}"))
        if text:
            self._assistant(extends=lambda _: False).reasoning_content = text

    def _call(self, item: InputItem, path: str, arguments: str) -> None:
        call_id, name = _needed(item.call_id, f"{path}.call_id"), _needed(item.name, f"{path}.name")
        name = full_name(name, item.namespace)
        turn = self._assistant(extends=lambda _: True)
        call = ToolCall(id=call_id, function=CalledFunction(name=name, arguments=arguments))
        turn.tool_calls = turn.tool_calls or []
        turn.tool_calls.append(call)
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
        if text is None:
            where = f"{path}[{index}]"
            raise InvalidRequestError(f"'{where}': a part needs its text.", param=where)
        parts.append(ContentPart(type="text", text=text))
    return parts


def _needed(value: T | None, path: str) -> T:
    if value is None:
        raise InvalidRequestError(f"Missing required parameter: '{path}'.", param=path)
    return value
