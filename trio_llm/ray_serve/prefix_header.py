"""Tell Ray's request router how a request begins: its proxy calls `middlewares` and sends a request through them.

The proxy routes a request before it has read the body. So this reads the part of the body that matters, and puts
the digests of its chunks into the header that Ray hands to request routers, as a session. It runs in Ray's proxy,
where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=trio_llm.ray_serve.prefix_header:middlewares`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Any

CHUNK_BYTES = 256
MAX_CHUNKS = 32
# A body whose prompt does not begin in its first part has other fields of this size in front: it gets no header.
_MAX_READ_BYTES = 2**16
_DIGEST_BYTES = 6
_HEADER = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().encode()
_PROMPT = re.compile(rb'"(?:messages|prompt|input|system|instructions)"\s*:')
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")

Receive = Callable[[], Awaitable[Any]]


def middlewares() -> list[Any]:
    """Return what Ray's proxy puts in front of itself."""
    from starlette.middleware import Middleware

    return [Middleware(PrefixHeader)]


def prefix_keys(body: bytes) -> list[str]:
    """Return a digest per whole chunk of the prompt, of everything up to its end: equal beginnings have equal ones.

    The prompt is not parsed: clients that send the same messages write them alike.
    """
    found = _PROMPT.search(body)
    if found is None:
        return []
    prompt, state, keys = body[found.end() :].lstrip(), blake2b(digest_size=_DIGEST_BYTES), list[str]()
    for at in range(0, min(len(prompt) - len(prompt) % CHUNK_BYTES, MAX_CHUNKS * CHUNK_BYTES), CHUNK_BYTES):
        state.update(prompt[at : at + CHUNK_BYTES])
        keys.append(state.hexdigest())
    return keys


class PrefixHeader:
    """Adds the header to requests that generate text and have no session of their own."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        if _is_generation(scope):
            messages, body = await _read(receive)
            if keys := prefix_keys(body):
                scope["headers"] = [*scope["headers"], (_HEADER, ",".join(keys).encode())]
            receive = _again(messages, receive)
        await self._app(scope, receive, send)


def _is_generation(scope: Any) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(_ENDPOINTS):
        return False
    return all(name.lower().replace(b"_", b"-") != _HEADER for name, _ in scope["headers"])


async def _read(receive: Receive) -> tuple[list[Any], bytes]:
    """Read until the first chunks of the prompt are there, or the body has ended."""
    messages: list[Any] = []
    body = b""
    while len(body) < _MAX_READ_BYTES:
        found = _PROMPT.search(body)
        if found is not None and len(body) - found.end() > MAX_CHUNKS * CHUNK_BYTES:
            break
        messages.append(message := await receive())
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return messages, body


def _again(messages: list[Any], receive: Receive) -> Receive:
    """Return a `receive` that returns what was read, then what follows."""

    async def receive_again() -> Any:
        return messages.pop(0) if messages else await receive()

    return receive_again
