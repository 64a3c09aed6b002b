"""The bodies of Anthropic's POST /v1/messages and its count_tokens, and the conversation that they are to a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from trio_llm.errors import InvalidRequestError
from trio_llm.server.fields import NotSupported
from trio_llm.server.requests import CalledFunction, ContentPart, Message, ToolCall

ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class TextBlock(Struct, kw_only=True, tag_field="type", tag="text"):
    """Text of a turn. Where to cache, here and below, is a hint: every prompt's beginning is cached."""

    not_supported: ClassVar[NotSupported] = {"citations": ([],)}

    text: str
    cache_control: dict[str, Any] | None = None


class ThinkingBlock(Struct, kw_only=True, tag_field="type", tag="thinking"):
    """What the assistant thought in an earlier turn. Signatures are not checked: nothing here depends on them."""

    thinking: str
    signature: str | None = None


class ToolUseBlock(Struct, kw_only=True, tag_field="type", tag="tool_use"):
    """A call that the assistant made in an earlier turn."""

    not_supported: ClassVar[NotSupported] = {"caller": ({"type": "direct"},), "toolset_name": ()}

    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None


class ToolResultBlock(Struct, kw_only=True, tag_field="type", tag="tool_result"):
    """What such a call returned."""

    not_supported: ClassVar[NotSupported] = {"toolset_name": ()}

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class Turn(Struct, kw_only=True):
    """One of `messages`."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolParam(Struct, kw_only=True):
    """A tool that the client runs; `input_schema` is the JSON schema of its input."""

    not_supported: ClassVar[NotSupported] = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "eager_input_streaming": (False, True),  # Input comes as it is written, always.
        "input_examples": ([],),
    }

    name: ToolName
    input_schema: dict[str, Any]
    type: Literal["custom"] = "custom"
    description: str | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


class ToolChoice(Struct, kw_only=True):
    """Which tools may be used, and whether one must be."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, kw_only=True):
    """Whether the model thinks first."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct, kw_only=True, rename={"schema_": "schema"}):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any]


class OutputConfig(Struct, kw_only=True):
    """What the answer is like."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountTokensBody(Struct, kw_only=True):
    """POST /v1/messages/count_tokens: a conversation, without what its answer is to be like."""

    not_supported: ClassVar[NotSupported] = {
        "container": (),
        "context_management": ({"edits": []},),
        "diagnostics": (),
        "inference_geo": (),
        "mcp_servers": ([],),
        "output_format": (),
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
        "user_profile_id": (),
        "workspace_id": (),
    }

    messages: Annotated[list[Turn], Meta(min_length=1)]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ToolParam], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None


class MessagesBody(CountTokensBody, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    # Names of the caller's own; they change nothing and are stored nowhere.
    metadata: dict[str, Any] | None = None


def conversation(body: CountTokensBody) -> list[Message]:
    """Return a chat's messages; neighbours of one role are one turn, as Anthropic has it.

    Raises:
        InvalidRequestError: A block in a turn that cannot hold it; names its place.
    """
    turns = _Turns()
    if body.system is not None:
        turns.last("system").content = _texts(body.system)
    for index, turn in enumerate(body.messages):
        blocks = [TextBlock(text=turn.content)] if isinstance(turn.content, str) else turn.content
        for position, block in enumerate(blocks):
            turns.add(turn.role, block, f"messages[{index}].content[{position}]")
        if not blocks:
            turns.last(turn.role)
    return turns.messages


class _Turns:
    """Puts blocks together into a chat's messages, of which each result of a tool is one of its own."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._names: dict[str, str] = {}

    def last(self, role: Literal["user", "assistant", "system"]) -> Message:
        """Return the turn to add to: the last one where it is of that role."""
        if not self.messages or self.messages[-1].role != role:
            self.messages.append(Message(role=role))
        return self.messages[-1]

    def add(self, role: Literal["user", "assistant", "system"], block: Block, path: str) -> None:
        match block:
            case TextBlock():
                turn = self.last(role)
                turn.content = _texts(turn.content or ()) + _texts(block.text)
            case ThinkingBlock() if role == "assistant":
                turn = self.last(role)
                turn.reasoning_content = (turn.reasoning_content or "") + block.thinking
            case ToolUseBlock() if role == "assistant":
                turn = self.last(role)
                call = ToolCall(id=block.id, function=CalledFunction(name=block.name, arguments=block.input))
                turn.tool_calls = [*(turn.tool_calls or ()), call]
                self._names[block.id] = block.name
            case ToolResultBlock() if role == "user":
                self._add_result(block, path)
            case _:
                raise InvalidRequestError(f"'{path}': a turn of the {role} holds no block of this type.", param=path)

    def _add_result(self, block: ToolResultBlock, path: str) -> None:
        if block.tool_use_id not in self._names:
            where = f"{path}.tool_use_id"
            raise InvalidRequestError(f"No tool_use before it has the id {block.tool_use_id[:64]!r}.", param=where)
        content = _texts(block.content or "")
        if block.is_error:
            # Templates know no failed calls: the model is told in words.
            content = [ContentPart(type="text", text="Error:"), *content]
        name = self._names[block.tool_use_id]
        self.messages.append(Message(role="tool", content=content, tool_call_id=block.tool_use_id, name=name))


def _texts(content: str | Sequence[TextBlock | ContentPart]) -> list[ContentPart]:
    texts = [content] if isinstance(content, str) else [block.text or "" for block in content]
    return [ContentPart(type="text", text=text) for text in texts]
