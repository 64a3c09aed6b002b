"""API keys: access is denied by default, per matched endpoint.

Never check the path: Quart routes `//v1/models` and `http://evil/v1/models` to /v1/models, so a check of the path's
prefix is no protection (as in CVE-2026-48746).
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterable
from pathlib import Path

from quart import request

from trio_llm.config import AuthConfig
from trio_llm.errors import ConfigError
from trio_llm.server.errors import HttpError
from trio_llm.server.http.peers import is_loopback, limited_name
from trio_llm.server.http.proxies import VOUCHED
from trio_llm.text_files import MAX_SETTINGS_BYTES, UnreadableFileError, read_text_file

logger = logging.getLogger(__name__)

_ID_CHARS = 16
_SAFE_KEY_CHARS = 16
# A proxy on this machine makes every peer look local; these headers reveal it.
_FORWARDING = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")


class ApiKeys:
    """The accepted keys, stored as digests and compared in constant time. No method can print a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys) if key]

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, key_id: object) -> bool:
        """Return whether `key_id`, from `identify`, belongs to an accepted key."""
        return any(key_id == stored.hex()[:_ID_CHARS] for stored in self._digests)

    def identify(self, given: Iterable[bytes]) -> str | None:
        """Return the id of the accepted key among `given`, None if there is none. Every key is always compared."""
        found: str | None = None
        for candidate in given:
            digest = hashlib.sha256(candidate).digest()
            for stored in self._digests:
                if secrets.compare_digest(digest, stored):
                    found = stored.hex()[:_ID_CHARS]
        return found


def load_keys(config: AuthConfig) -> ApiKeys:
    """Read all keys and warn of short ones. Raises as `read_keys`."""
    keys = read_keys(config)
    if num_short := sum(len(key) < _SAFE_KEY_CHARS for key in keys):
        logger.warning("%d API keys have fewer than %d characters: they can be guessed", num_short, _SAFE_KEY_CHARS)
    return ApiKeys(keys)


def read_keys(config: AuthConfig) -> list[str]:
    """Return all keys: those of the configuration, of its key file, and the administrators'.

    Raises:
        ConfigError: The key file cannot be read or holds no key; there is no key although one is required.
    """
    keys = [key for key in config.api_keys if key]
    if config.api_key_file is not None:
        try:
            lines = read_text_file(Path(config.api_key_file), MAX_SETTINGS_BYTES).splitlines()
        except UnreadableFileError as error:
            raise _bad_key_file(config.api_key_file, f"must be a readable text file ({error})") from None
        from_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not from_file:  # An empty file must not open the server to everyone.
            raise _bad_key_file(config.api_key_file, "must hold at least one key")
        keys += from_file
    keys += config.admin_api_keys
    if config.require_auth and not keys:
        raise ConfigError(key="auth.require_auth", value=True, source="configuration", allowed="needs an API key")
    return keys


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
    """Return the address of the socket's peer, or of the client that a trusted proxy names."""
    client = request.scope["client"]
    return client[0] if client else "local"


def peer_is_loopback() -> bool:
    """Return whether the current request comes from this machine.

    A proxy's header does not count: a proxy that forwards its client's header would make remote clients local.
    """
    return VOUCHED not in request.scope and is_loopback(peer_address())


def is_forwarded() -> bool:
    """Return whether the current request came through a proxy that is not trusted."""
    return VOUCHED not in request.scope and any(name in request.headers for name in _FORWARDING)


def check_operator(what: str, keys: ApiKeys, administrators: ApiKeys, key_id: str | None) -> None:
    """Allow what concerns all clients: with administrators' keys to them, with keys to all, else to this machine.

    Raises:
        HttpError: 401 or 403.
    """
    if keys and key_id is None:
        raise HttpError(401, f"{what} needs an API key.", code="invalid_api_key")
    if administrators and key_id not in administrators:
        raise HttpError(403, f"{what} needs an administrator's key.")
    if not keys and (not peer_is_loopback() or is_forwarded()):
        raise HttpError(403, f"{what} is open to this machine only: set VLLM_API_KEY to use it from elsewhere.")


def peer_name() -> str:
    """Return the name for the limits of the current request's peer."""
    return limited_name(peer_address())
