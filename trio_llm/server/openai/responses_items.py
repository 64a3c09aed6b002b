"""The output of a response: thinking, text and calls as items, and the events of each item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trio_llm.server.answers.responses import Event, ItemEvent, ItemStatus, OutputItem, OutputPart, PartEvent, TextEvent
from trio_llm.server.bodies.error_fields import new_id
from trio_llm.server.generation.parts import Part
from trio_llm.server.openai.responses_tools import OfferedTool

_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}


class OutputItems:
    """Converts parts to output items.

    Args:
        tools: What the model could call.

    Attributes:
        done: The complete items.
    """

    def __init__(self, tools: Sequence[OfferedTool]) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self.done: list[OutputItem] = []
        self._id = self._call_id = ""

    def begin(self, part: Part) -> list[Event]:
        self._id = new_id("ctc" if self._is_custom(part) else _PREFIXES[part.kind])
        self._call_id = new_id("call")
        added = ItemEvent(
            type="response.output_item.added", output_index=part.index, item=self._item(part, "in_progress")
        )
        if part.kind == "call":
            return [added]
        return [added, PartEvent(type="response.content_part.added", part=_content(part), **self._place(part))]

    def grow(self, part: Part, text: str) -> list[Event]:
        match part.kind:
            case "text":
                grown = TextEvent(
                    type="response.output_text.delta", delta=text, content_index=0, logprobs=[], **self._place(part)
                )
            case "reasoning":
                grown = TextEvent(
                    type="response.reasoning_text.delta", delta=text, content_index=0, **self._place(part)
                )
            case "call" if self._is_custom(part):
                grown = TextEvent(type="response.custom_tool_call_input.delta", delta=text, **self._place(part))
            case "call":
                grown = TextEvent(type="response.function_call_arguments.delta", delta=text, **self._place(part))
        return [grown]

    def end(self, part: Part, *, cut_short: bool) -> list[Event]:
        item = self._item(part, "incomplete" if cut_short else "completed")
        self.done.append(item)
        place, text = self._place(part), part.text
        item_done = ItemEvent(type="response.output_item.done", output_index=part.index, item=item)
        part_done = PartEvent(type="response.content_part.done", part=_content(part), **place)
        match part.kind:
            case "text":
                done = TextEvent(type="response.output_text.done", text=text, content_index=0, logprobs=[], **place)
            case "reasoning":
                done = TextEvent(type="response.reasoning_text.done", text=text, content_index=0, **place)
            case "call" if self._is_custom(part):
                return [TextEvent(type="response.custom_tool_call_input.done", input=text, **place), item_done]
            case "call":
                kind = "response.function_call_arguments.done"
                return [TextEvent(type=kind, name=self._name(part), arguments=text, **place), item_done]
        return [done, part_done, item_done]

    def _item(self, part: Part, status: ItemStatus) -> OutputItem:
        """Return the item so far; a new item has no content yet."""
        content = [] if status == "in_progress" else [_content(part)]
        match part.kind:
            case "text":
                return OutputItem(id=self._id, type="message", status=status, role="assistant", content=content)
            case "reasoning":
                return OutputItem(id=self._id, type="reasoning", status=status, summary=[], content=content)
            case "call":
                return self._call(part, status)

    def _call(self, part: Part, status: ItemStatus) -> OutputItem:
        tool = self._tools.get(part.name)
        item = OutputItem(
            id=self._id, type="function_call", status=status, call_id=self._call_id, name=self._name(part)
        )
        if tool is not None and tool.namespace is not None:
            item.namespace = tool.namespace
        if self._is_custom(part):
            item.type, item.input = "custom_tool_call", part.text
        else:
            item.arguments = part.text
        return item

    def _is_custom(self, part: Part) -> bool:
        tool = self._tools.get(part.name)
        return tool is not None and tool.is_custom

    def _name(self, part: Part) -> str:
        tool = self._tools.get(part.name)
        return part.name if tool is None else tool.tool.name

    def _place(self, part: Part) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": part.index}


def _content(part: Part) -> OutputPart:
    if part.kind == "reasoning":
        return OutputPart(type="reasoning_text", text=part.text)
    # Clients' types require annotations and log-probabilities of text, although none can be requested.
    return OutputPart(type="output_text", text=part.text, annotations=[], logprobs=[])
