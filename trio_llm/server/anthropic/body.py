"""The bodies of Anthropic's POST /v1/messages and its count_tokens, and the conversation that they are to a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from msgspec import Meta, Struct

from trio_llm.errors import InvalidRequestError
from trio_llm.server.bodies.tools import MAX_TOOLS, CalledFunction, ToolCall, ToolName
from trio_llm.server.bodies.types import ContentPart, Message
from trio_llm.server.bodies.unknown_fields import Neutral

T = TypeVar("T")


class TextBlock(Struct, kw_only=True, tag_field="type", tag="text"):
    """Text of a turn. Where to cache, here and below, is a hint: every prompt's beginning is cached.

    Attributes:
        text: The text.
        cache_control: Without effect: every prompt is cached.
    """

    hints: ClassVar[Neutral] = {"citations": ([],)}  # Of an earlier answer: they were for its reader.

    text: str
    cache_control: dict[str, Any] | None = None


class ThinkingBlock(Struct, kw_only=True, tag_field="type", tag="thinking"):
    """What the assistant thought in an earlier turn. Signatures are not checked: nothing here depends on them.

    Attributes:
        thinking: What was thought.
        signature: Without effect.
    """

    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Struct, kw_only=True, tag_field="type", tag="redacted_thinking"):
    """Encrypted thinking of another server, from an earlier turn: the model goes on without it."""

    hints: ClassVar[Neutral] = {"data": ()}


class ServerToolUseBlock(Struct, kw_only=True, tag_field="type", tag="server_tool_use"):
    """A call that another server ran itself: the model goes on without it."""

    hints: ClassVar[Neutral] = {"id": (), "name": (), "input": (), "caller": (), "cache_control": ()}


class WebSearchBlock(Struct, kw_only=True, tag_field="type", tag="web_search_tool_result"):
    """What another server found, encrypted: the model goes on without it."""

    hints: ClassVar[Neutral] = {"tool_use_id": (), "content": (), "caller": (), "cache_control": ()}


class ToolUseBlock(Struct, kw_only=True, tag_field="type", tag="tool_use"):
    """A call that the assistant made in an earlier turn.

    Attributes:
        id: Id of the call.
        name: Name of the tool.
        input: Arguments of the call.
        cache_control: Without effect: every prompt is cached.
    """

    not_supported: ClassVar[Neutral] = {"caller": ({"type": "direct"},), "toolset_name": ()}

    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None


class ToolReferenceBlock(Struct, kw_only=True, tag_field="type", tag="tool_reference"):
    """A tool that the client's search returned, by name; the model gets the definitions of all tools.

    Attributes:
        tool_name: Name of the tool.
        cache_control: Without effect: every prompt is cached.
    """

    tool_name: str
    cache_control: dict[str, Any] | None = None


class ToolResultBlock(Struct, kw_only=True, tag_field="type", tag="tool_result"):
    """What such a call returned.

    Attributes:
        tool_use_id: Id of the call.
        content: What the tool returned.
        is_error: Whether the call failed; the model gets this as text.
        cache_control: Without effect: every prompt is cached.
    """

    not_supported: ClassVar[Neutral] = {"toolset_name": ()}

    tool_use_id: str
    content: str | list[TextBlock | ToolReferenceBlock] | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None


Unread = RedactedThinkingBlock | ServerToolUseBlock | WebSearchBlock
Block = TextBlock | ThinkingBlock | Unread | ToolUseBlock | ToolResultBlock


class Turn(Struct, kw_only=True):
    """One of `messages`.

    Attributes:
        role: Who speaks.
        content: What is said.
    """

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolParam(Struct, kw_only=True):
    """A tool that the client runs; `input_schema` is the JSON schema of its input.

    Attributes:
        name: Name of the tool.
        input_schema: JSON schema of its input.
        type: Kind of the tool; other kinds than "custom" are dropped with a Warning.
        description: What it does, for the model.
        strict: Hold the input to the schema.
        cache_control: Without effect: every prompt is cached.
    """

    hints: ClassVar[Neutral] = {
        "defer_loading": (False,),
        "eager_input_streaming": (False, True),  # Input comes as it is written, always.
        "input_examples": ([],),
    }
    not_supported: ClassVar[Neutral] = {"allowed_callers": (["direct"],)}

    name: ToolName
    input_schema: dict[str, Any]
    type: Literal["custom"] = "custom"
    description: str | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


class ToolChoice(Struct, kw_only=True):
    """Which tools may be used, and whether one must be.

    Attributes:
        type: "auto": as the model likes; "any": some tool must be used; "tool": the named one; "none": no tool.
        name: Name of the tool, for type "tool".
        disable_parallel_tool_use: At most one call.
    """

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, kw_only=True):
    """Whether the model thinks first.

    Attributes:
        type: "enabled" and "adaptive": the model may think; "disabled": it does not, if it can help it.
        budget_tokens: Longest thinking, in tokens.
        display: "omitted" leaves the thinking out of the answer.
    """

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct, kw_only=True, rename={"schema_": "schema"}):
    """The form of the answer.

    Attributes:
        type: Always "json_schema".
        schema: JSON schema that the answer follows.
    """

    type: Literal["json_schema"]
    schema_: dict[str, Any]


class OutputConfig(Struct, kw_only=True):
    """What the answer is like.

    Attributes:
        format: The form of the answer.
        effort: How much the model thinks, for templates that have a switch for it.
    """

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountTokensBody(Struct, kw_only=True):
    """POST /v1/messages/count_tokens: a conversation, without what its answer is to be like.

    Attributes:
        messages: The conversation.
        model: Served name of the model; needed with `--strict` only.
        system: System prompt.
        tools: Tools that the client runs.
        tool_choice: Which tools may be used, and whether one must be.
        thinking: Whether the model thinks first.
        output_config: What the answer is like.
        cache_control: Without effect: every prompt is cached.
    """

    runnable_tools: ClassVar[frozenset[str]] = frozenset({"custom"})
    hints: ClassVar[Neutral] = {
        "context_management": ({"edits": []},),
        "diagnostics": (),
        "mcp_servers": ([],),
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
        "user_profile_id": (),
        "workspace_id": (),
    }
    not_supported: ClassVar[Neutral] = {"container": (), "inference_geo": (), "output_format": ()}

    messages: Annotated[list[Turn], Meta(min_length=1)]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ToolParam], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None


class MessagesBody(CountTokensBody, kw_only=True):
    """POST /v1/messages.

    Attributes:
        max_tokens: Longest answer, in tokens.
        stop_sequences: Texts that end the answer; they are left out of it.
        stream: Send the answer as server-sent events while it is generated.
        temperature: Randomness of sampling; 0 takes the likeliest token.
        top_p: Sample from the likeliest tokens whose probabilities add up to this.
        top_k: Sample from this many likeliest tokens; 0 for all.
        metadata: The caller's own data; without effect.
    """

    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    # Names of the caller's own; they change nothing and are stored nowhere.
    metadata: dict[str, Any] | None = None


def conversation(body: CountTokensBody) -> list[Message]:
    """Return a chat's messages; consecutive messages of one role become one turn, as in Anthropic's API.

    Raises:
        InvalidRequestError: A turn has a block that is not allowed in it; names the field.
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
    return turns.finished()


class _Turns:
    """Combines blocks into a chat's messages; each result of a tool becomes a separate message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._names: dict[str, str] = {}
        # Joined at the end: adding thousands of blocks to a text one by one would take quadratic time.
        self._thoughts: dict[int, tuple[Message, list[str]]] = {}

    def finished(self) -> list[Message]:
        """Return the messages."""
        for turn, texts in self._thoughts.values():
            turn.reasoning_content = "".join(texts)
        return self.messages

    def last(self, role: Literal["user", "assistant", "system"]) -> Message:
        """Return the turn to add to: the last one if it has that role, else a new one."""
        if not self.messages or self.messages[-1].role != role:
            self.messages.append(Message(role=role))
        return self.messages[-1]

    def add(self, role: Literal["user", "assistant", "system"], block: Block, path: str) -> None:
        match block:
            case TextBlock():
                turn = self.last(role)
                turn.content = _grown(turn.content, _texts(block.text))
            case ThinkingBlock() if role == "assistant":
                self._thoughts.setdefault(id(self.last(role)), (self.last(role), []))[1].append(block.thinking)
            case RedactedThinkingBlock() | ServerToolUseBlock() | WebSearchBlock() if role == "assistant":
                self.last(role)
            case ToolUseBlock() if role == "assistant":
                turn = self.last(role)
                call = ToolCall(id=block.id, function=CalledFunction(name=block.name, arguments=block.input))
                turn.tool_calls = _grown(turn.tool_calls, [call])
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
            # Templates have no flag for failed calls, so the text says it.
            content = [ContentPart(type="text", text="Error:"), *content]
        name = self._names[block.tool_use_id]
        self.messages.append(Message(role="tool", content=content, tool_call_id=block.tool_use_id, name=name))


def _grown(items: str | list[T] | None, more: list[T]) -> list[T]:
    """Extend a list in place, or return a new one."""
    if not isinstance(items, list):
        return more
    items += more
    return items


def _texts(content: str | Sequence[TextBlock | ToolReferenceBlock | ContentPart]) -> list[ContentPart]:
    if isinstance(content, str):
        return [ContentPart(type="text", text=content)]
    texts = (block.tool_name if isinstance(block, ToolReferenceBlock) else block.text or "" for block in content)
    return [ContentPart(type="text", text=text) for text in texts]
