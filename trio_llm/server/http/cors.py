"""CORS: the web pages that may use the API from a browser; none by default.

This is at the ASGI edge and not in Quart: a preflight has no key and must not need one, and a page can only read errors
(401, 404, 413, 429, 500) that have these headers too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import attrs

from trio_llm.config import ServerConfig
from trio_llm.errors import ConfigError

Headers = Sequence[tuple[bytes, bytes]]

_ANY = "*"
_METHODS = "GET, POST, DELETE"
_MAX_AGE_S = "600"
# Response headers that clients read; a browser hides all others from a page.
_EXPOSED = ", ".join(
    (
        "x-request-id",
        "retry-after",
        "retry-after-ms",
        "x-should-retry",
        "warning",
        *(f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
    )
)


@attrs.frozen
class Cors:
    """CORS headers for the allowed origins."""

    origins: frozenset[str]
    methods: str | None
    headers: str | None
    credentials: bool

    @classmethod
    def configured(cls, config: ServerConfig) -> Cors | None:
        """Return the settings' CORS, None if no origin is allowed.

        Raises:
            ConfigError: An invalid origin, or * with credentials.
        """
        origins = frozenset(origin.lower() for origin in config.allowed_origins)
        if not origins:
            return None
        for origin in origins - {_ANY}:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s,]+", origin):
                raise _refusal("server.allowed_origins", origin, "must be * or like https://chat.example")
        if config.allow_credentials and _ANY in origins:
            raise _refusal("server.allow_credentials", True, "needs origins by name: any page could use a visitor's")
        return cls(origins, _listed(config.allowed_methods), _listed(config.allowed_headers), config.allow_credentials)

    def marks(self, origin: str | None) -> Headers:
        """Return the headers of every response to a request of this origin."""
        if _ANY in self.origins:
            return [(b"access-control-allow-origin", b"*"), *_exposed()]
        marks = [(b"vary", b"Origin")]
        if origin is None or origin.lower() not in self.origins:
            return marks
        marks += [(b"access-control-allow-origin", origin.encode("latin-1")), *_exposed()]
        return [*marks, (b"access-control-allow-credentials", b"true")] if self.credentials else marks

    def preflight(self, scope: Any) -> Headers | None:
        """Return the headers of the response to a preflight; None if the request is not one."""
        asked = {name.lower(): value for name, value in scope["headers"]}
        method = asked.get(b"access-control-request-method")
        if scope["method"] != "OPTIONS" or method is None or b"origin" not in asked:
            return None
        headers = asked.get(b"access-control-request-headers", b"")
        return [
            (b"access-control-allow-methods", (self.methods or _METHODS).encode()),
            # * never includes Authorization, so name the requested headers.
            (b"access-control-allow-headers", headers if self.headers is None else self.headers.encode()),
            (b"access-control-max-age", _MAX_AGE_S.encode()),
            (b"vary", b"Access-Control-Request-Headers"),
        ]


def origin_of(scope: Any) -> str | None:
    """Return the origin of the page that sent a request."""
    return next((value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"origin"), None)


def _exposed() -> Headers:
    return [(b"access-control-expose-headers", _EXPOSED.encode())]


def _listed(texts: Sequence[str]) -> str | None:
    """Join a list; None if it is *."""
    return ", ".join(texts) if texts and _ANY not in texts else None


def _refusal(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(key=key, value=value, source="configuration", allowed=allowed)
