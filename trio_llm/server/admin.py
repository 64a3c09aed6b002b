"""What operators and their tools ask: /health, /ping, /load, /version, /metrics and /shutdown."""

from __future__ import annotations

import ipaddress
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from quart import Response, g, request
from quart_trio import QuartTrio

import trio_llm
from trio_llm.engine.metrics import exposition
from trio_llm.server import auth
from trio_llm.server.errors import HttpError
from trio_llm.server.proxies import VOUCHED
from trio_llm.server.services import Services

# A proxy on this machine makes every peer look local; these headers give it away.
_FORWARDING = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")
_WILDCARDS = frozenset({"0.0.0.0", "::", ""})


def register(app: QuartTrio, services: Services, http_metrics: CollectorRegistry) -> None:
    """Add the endpoints."""

    @app.get("/health")
    @app.route("/ping", methods=["GET", "POST"], endpoint="ping")
    async def health() -> tuple[dict[str, str], int]:
        status = services.engine.health().status
        return {"status": status}, 200 if status == "ok" else 503

    @app.get("/load")
    async def load() -> dict[str, int]:
        return {"server_load": services.num_requests}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": trio_llm.__version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        local = auth.peer_is_loopback() and not _is_forwarded()
        if services.keys and g.key_id is None and not local and not services.config.auth.public_metrics:
            raise HttpError(401, "The metrics are open to this machine; from elsewhere they need an API key.")
        text = await services.engine.render_metrics()
        return Response(text + exposition(http_metrics), content_type=CONTENT_TYPE_LATEST)

    @app.route("/shutdown", methods=["GET", "POST"], provide_automatic_options=False)
    async def shutdown() -> tuple[dict[str, Any], int]:
        if not services.config.server.enable_shutdown:
            raise HttpError(404, "There is no such path: /shutdown is switched off.")
        if request.method not in {"GET", "POST"}:
            raise HttpError(405, "/shutdown answers GET and POST only.", headers={"Allow": "GET, POST"})
        _check_shutdown(services)
        if services.shutdown is None:
            raise HttpError(501, "This server is run by hypercorn's command line: stop it there.")
        services.shutdown()
        return {"status": "draining"}, 202


def _check_shutdown(services: Services) -> None:
    """Allow it as the interface documents from this machine, from elsewhere with a key, and never to a web page.

    A GET that stops the server is one <img> tag away from every web page its operator visits: browsers announce
    themselves by these headers, and a page that rebound its own host name to 127.0.0.1 by the Host it asks for.
    """
    if any(request.headers.get(name) for name in ("Origin", "Referer")):
        raise HttpError(403, "/shutdown is not for web pages.")
    if request.headers.get("Sec-Fetch-Site", "none") != "none":
        raise HttpError(403, "/shutdown is not for web pages.")
    if _is_forwarded():
        raise HttpError(403, "/shutdown is not available through a proxy that --trusted-proxies does not name.")
    if services.keys and g.key_id is None:
        raise HttpError(401, "/shutdown needs an API key.", code="invalid_api_key")
    administrators = auth.ApiKeys(services.config.auth.admin_api_keys)
    if administrators and g.key_id not in administrators:
        raise HttpError(403, "/shutdown needs an administrator's key.")
    if not services.keys and not auth.peer_is_loopback():
        raise HttpError(403, "/shutdown is open to this machine only: set VLLM_API_KEY to use it from elsewhere.")
    if not _is_expected_host(_host_name(request.headers.get("Host", "")), services):
        raise HttpError(403, "/shutdown must be asked for by this machine's own name.")


def _is_expected_host(host: str, services: Services) -> bool:
    if _is_loopback_name(host):
        return True
    configured = services.config.server.host
    return g.key_id is not None and (configured in _WILDCARDS or host == configured.lower())


def _is_forwarded() -> bool:
    """Say whether the request came through a proxy whose word for its client is not taken."""
    return VOUCHED not in request.scope and any(name in request.headers for name in _FORWARDING)


def _host_name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def _is_loopback_name(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
