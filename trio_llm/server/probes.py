"""What the probes of orchestrators are told: /health, /ready and /ping.

The routes answer every request for them. `Probes` answers the plain ones of probes without a task, an app or a route,
with the same response, so that they do not wait behind other requests (see `http/accept.py`).
"""

from __future__ import annotations

import logging
import secrets
from email.utils import formatdate
from http import HTTPStatus

import attrs
import h11
import msgspec

from trio_llm.server.answers.models import Status
from trio_llm.server.http.accept import ProbeAnswer
from trio_llm.server.services import Services

logger = logging.getLogger(__name__)

_TARGETS = frozenset({b"/health", b"/ready", b"/ping"})
_PREFIX = b"GET /"
_END = b"\r\n\r\n"
# With any other header the request is not plain: it may have a body, come from a web page or through a proxy.
_PLAIN_HEADERS = frozenset({b"host", b"user-agent", b"accept", b"accept-encoding", b"authorization", b"connection"})
_CONNECTION = frozenset({b"close", b"keep-alive"})


def health_of(services: Services) -> tuple[Status, int]:
    """Return body and status code of /health and /ping."""
    status = services.engine.health().status
    if status == "ok" and services.background.is_failing:
        return Status(status="degraded"), 503
    return Status(status=status), 200 if status == "ok" else 503


def readiness_of(services: Services) -> tuple[Status, int]:
    """Return body and status code of /ready: as /health, and not while the process prepares to end."""
    return (Status(status="draining"), 503) if services.draining else health_of(services)


@attrs.frozen
class Probes:
    """Answers plain requests of probes."""

    services: Services

    def answer(self, head: bytes, peer: str) -> ProbeAnswer | None:
        """Answer a plain GET of /health, /ready or /ping; None for everything else, which needs the app.

        Args:
            head: The first bytes of a connection.
            peer: Address of the client.
        """
        end = head.find(_END)
        if end < 0 or not head.startswith(_PREFIX) or head[4 : head.find(b" ", 4)] not in _TARGETS:
            return None
        if (request := _parse(head[: end + len(_END)])) is None:
            return None
        connection = {value.lower() for name, value in request.headers if name == b"connection"}
        is_plain = {name for name, _ in request.headers} <= _PLAIN_HEADERS and connection <= _CONNECTION
        if not is_plain or request.http_version != b"1.1":
            return None
        body, status = (readiness_of if request.target == b"/ready" else health_of)(self.services)
        request_id = f"req-{secrets.token_hex(12)}"
        if self.services.config.server.log_probes:
            path = request.target.decode()
            logger.info("GET %s from %s %d, request %s", path, peer, status, request_id)
        closes = b"close" in connection
        return ProbeAnswer(end + len(_END), _response(msgspec.json.encode(body), status, request_id, closes), closes)


def _parse(head: bytes) -> h11.Request | None:
    parser = h11.Connection(h11.SERVER)
    parser.receive_data(head)
    try:
        event = parser.next_event()
    except h11.RemoteProtocolError:
        return None
    return event if isinstance(event, h11.Request) else None


def _response(body: bytes, status: int, request_id: str, closes: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"x-request-id: {request_id}",
        f"date: {formatdate(usegmt=True)}",
        *(["connection: close"] if closes else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
