"""Who may call what: API keys, deny by default on the matched endpoint.

Never by path: Quart routes `//v1/models` and `http://evil/v1/models` to /v1/models, so a check of the path's
beginning is no check (the shape of CVE-2026-48746).
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import secrets
from collections.abc import Iterable
from pathlib import Path

from quart import request

from trio_llm.config import AuthConfig
from trio_llm.errors import ConfigError

logger = logging.getLogger(__name__)

_ID_CHARS = 16
_SAFE_KEY_CHARS = 16


class ApiKeys:
    """The accepted keys, as digests: compared in constant time, and nothing here can print one."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys) if key]

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, key_id: object) -> bool:
        """Say whether an id that `identify` gave is that of a key here."""
        return any(key_id == known.hex()[:_ID_CHARS] for known in self._digests)

    def identify(self, given: Iterable[bytes]) -> str | None:
        """Return the id of the key among `given`, None if there is none. Every key is compared every time."""
        found: str | None = None
        for candidate in given:
            digest = hashlib.sha256(candidate).digest()
            for known in self._digests:
                if secrets.compare_digest(digest, known):
                    found = known.hex()[:_ID_CHARS]
        return found


def load_keys(config: AuthConfig) -> ApiKeys:
    """Read all keys: those of the configuration, of its key file, and the administrators'.

    Raises:
        ConfigError: The key file cannot be read or holds no key.
    """
    keys = [key for key in config.api_keys if key]
    if config.api_key_file is not None:
        try:
            lines = Path(config.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise _bad_key_file(config.api_key_file, "must be a readable text file") from None
        from_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not from_file:  # Starting open because a file is empty would be the worst of surprises.
            raise _bad_key_file(config.api_key_file, "must hold at least one key")
        keys += from_file
    keys += config.admin_api_keys
    if num_short := sum(len(key) < _SAFE_KEY_CHARS for key in keys):
        logger.warning("%d API keys have fewer than %d characters: they can be guessed", num_short, _SAFE_KEY_CHARS)
    return ApiKeys(keys)


def _bad_key_file(path: str, allowed: str) -> ConfigError:
    return ConfigError(key="auth.api_key_file", value=path, source="configuration", allowed=allowed)


def presented_keys() -> list[bytes]:
    """Return the keys that the current request presents: as Bearer token, or as x-api-key."""
    keys = [value.encode("latin-1") for value in request.headers.getlist("x-api-key")]
    for value in request.headers.getlist("Authorization"):
        scheme, _, token = value.partition(" ")
        if scheme.lower() == "bearer":
            keys.append(token.strip().encode("latin-1"))
    return keys


def peer_address() -> str:
    """Return the address at the other end of the socket, or the one that a trusted proxy there vouches for."""
    client = request.scope["client"]
    return client[0] if client else "local"


def peer_is_loopback() -> bool:
    """Say whether the current request comes from this machine."""
    return is_loopback(peer_address())


def peer_name() -> str:
    """Return the name that the peer of the current request is limited by."""
    return limited_name(peer_address())


def is_loopback(address: str) -> bool:
    """Say whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def limited_name(address: str) -> str:
    """Return the name that an address is limited by; an IPv6 host has a whole /64 to make up addresses from."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
