"""Tools for a model whose template has none: a prompt that asks for calls in Hermes' form and repeats past ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INSTRUCTIONS = """You may call functions to help with the user's request. These functions are available, one per line:
<tools>
{tools}
</tools>
To call a function, write its name and arguments as a JSON object between these tags, and nothing after the last call:
<tool_call>
{{"name": "the name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
The result comes back between <tool_response> and </tool_response>. If no function helps, answer without a call."""


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Return messages that need no template with tools: calls and results are text, tools are described first.

    A result is part of the adjacent turn of the user.

    Tools are described in the system's message if the conversation begins with one, else in the first message of the
    user: some templates know no system either.

    Args:
        messages: As `history` returns them.
        tools: What the model may call; None if only past calls are converted.
    """
    converted: list[dict[str, Any]] = []
    before = None
    for message in messages:
        plain = _as_text(message)
        # Many templates insist that roles alternate. What the caller wrote as two messages stays two.
        if converted and converted[-1]["role"] == plain["role"] and "tool" in (before, message["role"]):
            converted[-1]["content"] += "\n" + plain["content"]
        else:
            converted.append(plain)
        before = message["role"]
    if tools:
        described = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if not converted or converted[0]["role"] not in ("system", "developer", "user"):
            converted.insert(0, {"role": "user", "content": ""})
        own = converted[0]["content"]
        parts = (own, described) if converted[0]["role"] != "user" else (described, own)
        converted[0]["content"] = "\n\n".join(filter(None, parts))
    return converted


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its calls, or the result that it is, as text."""
    plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    for call in message.get("tool_calls", ()):
        text = f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        plain["content"] = f"{plain['content']}\n{text}" if plain["content"] else text
    return plain
