"""Endpoints for operators: /health, /ready, /ping, /load, /version, /metrics and /shutdown."""

from __future__ import annotations

import ipaddress

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from quart import Response, g, request
from quart_trio import QuartTrio

import trio_llm
from trio_llm.engine.metrics import exposition
from trio_llm.server.access import auth
from trio_llm.server.access.web_pages import host_name
from trio_llm.server.answers.models import Load, Status, Version
from trio_llm.server.errors import HttpError
from trio_llm.server.http.json_response import json_response
from trio_llm.server.probes import health_of, readiness_of
from trio_llm.server.services import Services

_WILDCARDS = frozenset({"0.0.0.0", "::", ""})


def register(app: QuartTrio, services: Services, http_metrics: CollectorRegistry) -> None:
    """Add the endpoints."""

    @app.get("/health")
    @app.route("/ping", methods=["GET", "POST"], endpoint="ping")
    async def health() -> Response:
        return json_response(*health_of(services))

    @app.get("/ready")
    async def ready() -> Response:
        """Say whether to send more requests here."""
        return json_response(*readiness_of(services))

    @app.get("/load")
    async def load() -> Response:
        return json_response(Load(server_load=services.num_requests))

    @app.get("/version")
    async def version() -> Response:
        return json_response(Version(version=trio_llm.__version__))

    @app.get("/metrics")
    async def metrics() -> Response:
        local = auth.peer_is_loopback() and not auth.is_forwarded()
        if services.keys and g.key_id is None and not local and not services.config.auth.public_metrics:
            raise HttpError(401, "The metrics are open to this machine; from elsewhere they need an API key.")
        text = await services.engine.render_metrics()
        return Response(text + exposition(http_metrics), content_type=CONTENT_TYPE_LATEST)

    @app.route("/shutdown", methods=["GET", "POST"], provide_automatic_options=False)
    async def shutdown() -> Response:
        if not services.config.server.enable_shutdown:
            raise HttpError(404, "There is no such path: /shutdown is switched off.")
        if request.method not in {"GET", "POST"}:
            raise HttpError(405, "/shutdown answers GET and POST only.", headers={"Allow": "GET, POST"})
        _check_shutdown(services)
        if services.shutdown is None:
            raise HttpError(501, "This server is run by hypercorn's command line: stop it there.")
        services.shutdown()
        return json_response(Status(status="draining"), 202)


def _check_shutdown(services: Services) -> None:
    """Allow /shutdown from this machine, from elsewhere with a key, and never from a web page.

    Any web page that the operator visits could send this GET with an <img> tag. Browsers are known by these headers,
    and DNS rebinding by the Host header.
    """
    if any(request.headers.get(name) for name in ("Origin", "Referer")):
        raise HttpError(403, "/shutdown is not for web pages.")
    if request.headers.get("Sec-Fetch-Site", "none") != "none":
        raise HttpError(403, "/shutdown is not for web pages.")
    if auth.is_forwarded():
        raise HttpError(403, "/shutdown is not available through a proxy that --trusted-proxies does not name.")
    auth.check_operator("/shutdown", services.keys, services.administrators, g.key_id)
    if not _is_expected_host(host_name(request.headers.get("Host", "")), services):
        raise HttpError(403, "/shutdown needs a Host header that names this machine.")


def _is_expected_host(host: str, services: Services) -> bool:
    if _is_loopback_name(host):
        return True
    configured = services.config.server.host
    return g.key_id is not None and (configured in _WILDCARDS or host == configured.lower())


def _is_loopback_name(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
