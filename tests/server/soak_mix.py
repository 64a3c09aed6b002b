"""The requests of a soak: mixed, with grammars, tools, streams and errors; for `test_soak.py` and the benchmark."""

from __future__ import annotations

from typing import Any

from tests.server.helpers import function

MAX_BYTES_PER_REQUEST = 64
HI = [{"role": "user", "content": "hi"}]
# Its client leaves while it is answered.
LEAVING = ("/v1/completions", {"prompt": "a", "max_tokens": 400, "stream": True})


def mix(number: int) -> list[tuple[str, dict[str, Any]]]:
    """Return path and body of one request of each kind; `number` makes them differ from others'."""
    chat: dict[str, Any] = {"messages": HI, "max_tokens": 8, "user": f"user {number}"}
    schema = {"name": "x", "schema": {"type": "object", "properties": {f"a{number % 8}": {"type": "integer"}}}}
    return [
        ("/v1/completions", {"prompt": f"request {number}", "max_tokens": 8, "logprobs": 2}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 4, "n": 2, "temperature": 1, "seed": number}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 8, "stop": [f"{number}"], "stream": True}),
        ("/v1/completions", {"prompt": "a", "temperature": 9}),
        ("/v1/chat/completions", {**chat, "response_format": {"type": "json_schema", "json_schema": schema}}),
        ("/v1/chat/completions", {**chat, "tools": [function("f", a={"type": "integer"})], "tool_choice": "required"}),
        ("/v1/embeddings", {"input": f"{number}"}),
        ("/tokenize", {"prompt": f"{number}"}),
        (f"/nowhere/{number}", {}),
    ]
