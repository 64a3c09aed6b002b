"""The body of the current HTTP request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from msgspec import Struct
from quart import current_app, g, request

from trio_llm.config import Config
from trio_llm.server.amounts import unknown_field
from trio_llm.server.json_body import check_media_type
from trio_llm.server.requests import parse_body

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=Struct)

CONFIG = "TRIO_LLM"
"""Where the app's own configuration holds ours."""
_MAX_NAMED = 10


async def read_body(kind: type[Body]) -> Body:
    """Read, parse and check the body of the current request.

    Fields that nobody here knows change nothing: clients send such, so they are not refused but in strict mode; they
    are named in a `Warning` header and in the log.
    """
    check_media_type(request.headers.get("Content-Type"), request.headers.get("Content-Encoding"))
    body, unknown = parse_body(cast(bytes, await request.get_data()), kind, current_config().limits)
    warn_of_unknown(unknown)
    return body


def current_config() -> Config:
    """Return the configuration that the current app was made with."""
    return cast(Any, current_app).config[CONFIG]


def warn_of_unknown(fields: Sequence[str]) -> None:
    """Tell the current client and the log of fields that change nothing. Refuses them in strict mode."""
    if fields and current_config().limits.strict:
        raise unknown_field(fields[0])
    if fields:
        names = ", ".join(_printable(name) for name in fields[:_MAX_NAMED])
        warn(f"Ignored unknown fields: {names}")
        logger.info("ignored unknown fields of %s: %s", request.path, names)


def warn(text: str) -> None:
    """Tell the current client something in a `Warning` header of the response; plain characters only."""
    g.setdefault("warnings", []).append(f'299 trio-llm "{text}"')


def _printable(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-[]") else "?" for c in name[:64])
