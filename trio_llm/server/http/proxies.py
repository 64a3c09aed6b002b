"""Find the client's address in Forwarded and X-Forwarded-For, if the request comes through a trusted proxy."""

from __future__ import annotations

import ipaddress
import re
import urllib.request
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import attrs

from trio_llm.errors import ConfigError
from trio_llm.server.errors import HttpError

VOUCHED = "trio_llm.vouched"
"""Set in a scope whose client is the one that a trusted proxy named."""

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
_QUOTED = r'"(?:[^"\\]|\\.)*+"'
_BALANCED = re.compile(rf'(?:[^"]|{_QUOTED})*+')
_PAIR = re.compile(rf'\s*(?P<name>[^\s=;"]+)=(?P<value>{_QUOTED}|[^\s;"]*)\s*(?:;|$)')


@attrs.frozen
class TrustedProxies:
    """The networks of trusted reverse proxies."""

    networks: tuple[_Network, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> TrustedProxies:
        """Read addresses and networks. Raises ConfigError for a text that is neither."""
        networks: list[_Network] = []
        for text in texts:
            try:
                networks.append(ipaddress.ip_network(text.strip()))
            except ValueError:
                allowed = "must be an IP address or a network like 10.0.0.0/8"
                raise ConfigError("server.trusted_proxies", text, "configuration", allowed) from None
        return cls(tuple(networks))

    def __contains__(self, address: str) -> bool:
        """Return whether an address is that of a trusted proxy."""
        try:
            return self._trusts(_normal(ipaddress.ip_address(address)))
        except ValueError:
            return False

    def see_through(self, scope: Any) -> None:
        """Replace the proxy's address in the scope by the client's.

        The client is the right-most address that is not a trusted proxy: it can forge everything to the left of it.

        Raises:
            HttpError: 400, a trusted proxy names no address. Its own address could make a remote client local.
        """
        if not self.networks or scope["client"] is None or scope["client"][0] not in self:
            return
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        plain = [value for name, value in headers if name == b"x-forwarded-for"]
        standard = [value for name, value in headers if name == b"forwarded"]
        clients = [self._client(hops) for hops in (_plain_hops(plain), _standard_hops(standard)) if hops]
        if len(set(clients)) > 1:  # A proxy that knows only one of the headers passed the other on.
            raise HttpError(400, "Forwarded and X-Forwarded-For name different clients.")
        if clients:
            scope["client"] = (clients[0], 0)
            scope[VOUCHED] = True

    def _client(self, hops: Sequence[str]) -> str:
        address: _Address | None = None
        for hop in reversed(hops):
            address = _address(hop)
            if not self._trusts(address):
                break
        return str(address)

    def _trusts(self, address: _Address) -> bool:
        return any(address in network for network in self.networks)


def _normal(address: _Address) -> _Address:
    return getattr(address, "ipv4_mapped", None) or address


def _address(hop: str) -> _Address:
    """Read `1.2.3.4`, `1.2.3.4:5`, `::1`, `[::1]` or `[::1]:5`."""
    match = re.fullmatch(r"\[([^\]]*)\](?::\d+)?|([^:]*):\d+|(.*)", hop.strip())
    text = next((part for part in match.groups() if part is not None), "") if match else ""
    try:
        return _normal(ipaddress.ip_address(text))
    except ValueError:
        raise HttpError(400, "A proxy names no IP address as its client.") from None


def _plain_hops(values: Iterable[str]) -> list[str]:
    return [hop for value in values for hop in value.split(",")]


def _standard_hops(values: Iterable[str]) -> list[str]:
    return [hop for value in values for hop in _elements(value)]


def _elements(value: str) -> list[str]:
    """Return the `for` of each element of a Forwarded header (RFC 7239), empty where it cannot be clients."""
    if not _BALANCED.fullmatch(value):  # An open quote of the client would hide what the proxy appended.
        return [""]
    return [_client_of(element) for element in urllib.request.parse_http_list(value) or [""]]


def _client_of(element: str) -> str:
    at = 0
    while match := _PAIR.match(element, at):
        if match["name"].lower() == "for":
            return match["value"].strip('"')
        at = match.end()
    return ""
