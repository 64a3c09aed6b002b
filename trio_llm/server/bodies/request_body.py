"""The body of the current HTTP request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar, cast

from msgspec import Struct
from quart import current_app, g, request

from trio_llm.config import Config
from trio_llm.server.bodies.pipeline import parse_body
from trio_llm.server.bodies.unknown_fields import ExtraField, unknown_field
from trio_llm.server.errors import HttpError
from trio_llm.server.fair_threads import FairThreads

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=Struct)

CONFIG = "TRIO_LLM"
"""Key of trio-llm's configuration in Quart's."""
_MAX_NAMED = 10
_KINDS = {
    "unknown": "Ignored unknown fields",
    "hint": "Ignored hints",
    "tool": "Dropped tools that this server cannot run",
}
# Parsing takes up to 0.2 ms per KiB, for short strings: at most 6 ms on the event loop.
_MAX_INLINE_BYTES = 32 * 1024


async def read_body(kind: type[Body]) -> Body:
    """Read, parse and check the body of the current request; `Warning` headers name fields without effect."""
    check_media_type(request.headers.get("Content-Type"), request.headers.get("Content-Encoding"))
    data = cast(bytes, await request.get_data())
    parse = partial(parse_body, data, kind, current_config().limits)
    if len(data) <= _MAX_INLINE_BYTES:
        body, extras = parse()
    else:
        threads: FairThreads = cast(Any, current_app).services.threads
        body, extras = await threads.run(parse)
    warn_of(extras)
    return body


def check_media_type(content_type: str | None, content_encoding: str | None) -> None:
    """Refuse a body that is not plain JSON according to its headers.

    Browsers send a preflight before `application/json`, so no web page can post to a local server. Bodies are not
    decompressed, so a small one cannot become large.
    """
    if content_encoding not in {None, "", "identity"}:
        raise HttpError(415, f"Content-Encoding {content_encoding!r} is not supported: send the body uncompressed.")
    if (content_type or "").partition(";")[0].strip().lower() != "application/json":
        raise HttpError(415, "Unsupported Media Type: only 'application/json' is allowed.")


def current_config() -> Config:
    """Return the configuration of the current app."""
    return cast(Any, current_app).config[CONFIG]


def warn_of(extras: Sequence[ExtraField]) -> None:
    """Name fields without effect to the client and in the log, one warning per kind."""
    for kind, what in _KINDS.items():
        if named := [extra for extra in extras if extra.kind == kind]:
            more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
            names = ", ".join(map(_named, named[:_MAX_NAMED])) + more
            warn(f"{what}: {names}")
            logger.info("%s of %s: %s", what, request.path, names)


def warn_of_unknown(fields: Sequence[str]) -> None:
    """Name unknown fields to the client and in the log; in strict mode refuse the first one."""
    if fields and current_config().limits.strict:
        raise unknown_field(ExtraField(fields[0], "unknown"))
    warn_of([ExtraField(name, "unknown") for name in fields])


def warn(text: str) -> None:
    """Add a `Warning` header to the current response. `text` is printable ASCII without quotes."""
    g.setdefault("warnings", []).append(f'299 trio-llm "{text}"')


def _named(extra: ExtraField) -> str:
    return _printable(extra.path) + (f" (did you mean {extra.meant}?)" if extra.meant else "")


def _printable(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-[]=") else "?" for c in name[:64])
