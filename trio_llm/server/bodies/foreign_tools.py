"""Tools that only the server of another vendor can run (web search, code interpreter, MCP connectors): dropped."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, cast

from trio_llm.server.bodies.unknown_fields import ExtraField

_LEFT_TO_THE_MODEL = ("auto", {"type": "auto"}, "none", {"type": "none"})


def drop_foreign_tools(body: dict[str, Any], runnable: Container[str] | None) -> list[ExtraField]:
    """Remove the `tools` that this server cannot run, and return them.

    Coding agents send such tools with every request and work without them. A `tool_choice` of a removed tool stays and
    is refused later.

    Args:
        body: A parsed request body; changed in place.
        runnable: The types of tools that the API's clients run. None for an API without tools.
    """
    tools = body.get("tools")
    if runnable is None or not isinstance(tools, list):
        return []
    kept: list[Any] = []
    dropped: list[ExtraField] = []
    for index, tool in enumerate(cast("list[Any]", tools)):
        kind = cast("dict[str, Any]", tool).get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind not in runnable:
            dropped.append(ExtraField(f"tools[{index}].type={kind[:64]}", "tool"))
        else:
            kept.append(tool)
    if dropped:
        body["tools"] = kept
    if dropped and not kept:
        del body["tools"]
        if body.get("tool_choice") in _LEFT_TO_THE_MODEL:
            del body["tool_choice"]
    return dropped
