"""Refuse requests of web pages that no setting allows: of other origins, or through DNS rebinding.

A browser sends some requests, such as a multipart upload, for any page without a preflight. The page cannot read the
response, but the server handles the request. A page with a host name that resolves to 127.0.0.1 (DNS rebinding) can
even read it. Requests with a valid key are not checked: a page has no key unless its user enters one.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import attrs
from quart import request

from trio_llm.config import ServerConfig
from trio_llm.server.access import auth
from trio_llm.server.errors import HttpError

_ANY = "*"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# Names below these, and names without a dot, cannot be registered, so no remote page has one.
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".test")


@attrs.frozen
class WebPages:
    """The pages that may send requests without a key."""

    origins: frozenset[str]
    hosts: frozenset[str]

    @classmethod
    def configured(cls, config: ServerConfig) -> WebPages:
        origins = frozenset(origin.lower() for origin in config.allowed_origins)
        return cls(origins, frozenset(host.lower() for host in (*config.allowed_hosts, config.host)))

    def check(self) -> None:
        """Check the current request, which has no valid key.

        Raises:
            HttpError: 403, it is from a page of another origin, or its Host is not a name of this machine.
        """
        host = request.headers.get("Host", "")
        origin = request.headers.get("Origin")
        if origin is not None and not self._allows_origin(origin.lower(), host.lower()):
            quoted = origin[:100]
            raise HttpError(403, f"Web pages of {quoted!r} may not use this server (--allowed-origins).")
        if origin is None and request.method not in _SAFE_METHODS:
            site = request.headers.get("Sec-Fetch-Site", "none")
            if site in {"cross-site", "same-site"}:
                raise HttpError(403, "Web pages of other origins may not use this server (--allowed-origins).")
        if auth.peer_is_loopback() and not self._allows_host(host_name(host)):
            quoted = host[:100]
            raise HttpError(403, f"Host {quoted!r} is not a name of this machine (--allowed-hosts).")

    def _allows_origin(self, origin: str, host: str) -> bool:
        return bool({_ANY, origin} & self.origins) or urlsplit(origin).netloc == host

    def _allows_host(self, name: str) -> bool:
        local = "." not in name or name.endswith(_LOCAL_SUFFIXES) or _is_address(name)
        return local or bool({_ANY, name} & self.hosts)


def host_name(host: str) -> str:
    """Return the name in a Host header, in lower case and without its port."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
