"""The app: every endpoint registered, and what holds for all of them - keys, limits, errors, headers."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import trio
from quart import Response, g, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from trio_llm.config import Config
from trio_llm.engine import Engine
from trio_llm.errors import CheckpointError, ConfigError
from trio_llm.server import (
    admin,
    auth,
    batch_service,
    chat,
    completions,
    embeddings,
    messages,
    models,
    openapi,
    responses,
    stats_log,
    tokenization,
    tracing,
)
from trio_llm.server.amounts import flag_of
from trio_llm.server.body import CONFIG, current_config
from trio_llm.server.chat_template import ChatTemplate
from trio_llm.server.cors import Cors
from trio_llm.server.edge import LIFETIME, Edge, Lifetime, body_too_slow
from trio_llm.server.errors import HttpError, error_body, to_http_error
from trio_llm.server.http_metrics import HttpMetrics
from trio_llm.server.limits import Limits
from trio_llm.server.proxies import TrustedProxies
from trio_llm.server.services import Services, model_names
from trio_llm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_REQUEST_ID_CHARS = 128
# Open to everybody, key or not.
_PUBLIC = frozenset({"health", "ping"})
# Decide for themselves who may call them.
_SELF_GUARDED = frozenset({"metrics", "shutdown"})


class ServerApp(QuartTrio):
    """The Quart app, and what it works with."""

    services: Services

    def last_call(self) -> None:
        """End the streams that are still open with an error event; see `serve`."""
        self.services.last_call()


def create_app(
    engine: Engine,
    config: Config,
    *,
    shutdown: Callable[[], None] | None = None,
    clock: Callable[[], float] = trio.current_time,
) -> ServerApp:
    """Make the app that serves `engine`, ready for `serve` or any ASGI server on Trio.

    Args:
        engine: Open for as long as the app serves.
        config: Its server and auth parts are used here.
        shutdown: Begins an orderly end of the process, for GET /shutdown.
        clock: Seconds, for the rate limit.

    Raises:
        ConfigError: A key file or chat template that cannot be read; no key although one is required; traces are
            wanted and OpenTelemetry is not installed.
        CheckpointError: A chat template that cannot be parsed.
    """
    keys = auth.load_keys(config.auth)
    if config.auth.require_auth and not keys:
        raise ConfigError(key="auth.require_auth", value=True, source="configuration", allowed="needs an API key")
    app = ServerApp("trio_llm", static_folder=None)
    app.services = Services(
        engine=engine,
        config=config,
        names=model_names(engine, config),
        template=_load_template(config, engine.tokenizer),
        shutdown=shutdown,
        keys=keys,
    )
    _configure(app, config)
    metrics = HttpMetrics(auth_enabled=bool(keys))
    limits = Limits(config.auth, clock)
    _guard(app, limits)
    _finish_responses(app, metrics)
    app.register_error_handler(Exception, _error_response)
    admin.register(app, app.services, metrics.registry)
    models.register(app, app.services)
    completions.register(app, app.services)
    chat.register(app, app.services)
    responses.register(app, app.services)
    messages.register(app, app.services)
    embeddings.register(app, app.services)
    tokenization.register(app, app.services)
    batch_service.register(app, app.services, limits)
    tracing.register(app, app.services)
    stats_log.register(app, app.services)
    openapi.register(app, config.limits)
    proxies = TrustedProxies.parse(config.server.trusted_proxies)
    app.asgi_app = Edge(app=app.asgi_app, limits=config.limits, proxies=proxies, cors=Cors.configured(config.server))
    return app


def _configure(app: ServerApp, config: Config) -> None:
    app.json.sort_keys = False  # pyright: ignore[reportAttributeAccessIssue]
    app.config["RESPONSE_TIMEOUT"] = None  # Quart's minute would end a stream in the middle, without a word.
    app.config["BODY_TIMEOUT"] = config.limits.body_timeout_s
    app.config["MAX_CONTENT_LENGTH"] = config.limits.max_body_bytes
    app.config[CONFIG] = config


def _load_template(config: Config, tokenizer: Tokenizer) -> ChatTemplate | None:
    source = tokenizer.chat_template
    if (path := config.server.chat_template) is not None:
        try:
            source = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise ConfigError(
                key="server.chat_template", value=path, source="configuration", allowed="must be a readable text file"
            ) from None
    if source is None:
        return None
    try:
        special = tokenizer.named_special_tokens, tokenizer.special_tokens
        return ChatTemplate(source, *special, config.limits)
    except CheckpointError as error:
        # A model whose template is broken still completes prompts; one that was asked for must work.
        if config.server.chat_template is not None:
            raise
        logger.warning("%s: /v1/chat/completions is not available", error)
        return None


def _guard(app: ServerApp, limits: Limits) -> None:
    """Check key and rate before anything else, also on paths that do not exist."""
    keys = app.services.keys

    @app.before_request
    async def guard() -> None:
        g.key_id = keys.identify(auth.presented_keys())
        if request.endpoint in _PUBLIC or request.endpoint in _SELF_GUARDED:
            return
        if keys and g.key_id is None:
            raise HttpError(
                401,
                "A valid API key is needed: send it as `Authorization: Bearer <key>`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if g.key_id is not None or not auth.peer_is_loopback():
            headers: dict[str, str] = {}
            g.rate_headers = headers
            limits.admit(g.key_id or auth.peer_name(), cast(Any, request.scope)[LIFETIME], headers)


def _finish_responses(app: ServerApp, metrics: HttpMetrics) -> None:
    @app.after_request
    async def finish(response: Response) -> Response:
        given = request.headers.get("x-request-id", "")
        usable = 0 < len(given) <= _MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable()
        response.headers["x-request-id"] = given if usable else f"req-{secrets.token_hex(12)}"
        response.headers.update(g.get("rate_headers", {}))
        for warning in g.get("warnings", ()):
            response.headers.add("Warning", warning)
        rule = request.url_rule.rule if request.url_rule is not None else None
        labels = metrics.answered(rule, request.method, response.status_code)
        lifetime: Lifetime = cast(Any, request.scope)[LIFETIME]
        lifetime.stack.callback(lambda: metrics.ended(labels, trio.current_time() - lifetime.began_s))
        request_id = response.headers["x-request-id"]
        shown = (labels[1], labels[0], auth.peer_address(), response.status_code, request_id)
        logger.info("%s %s from %s %d, request %s", *shown)
        return response


async def _error_response(error: Exception) -> Response:
    """Answer any error in the shape of the API it is of; of an unexpected one the client learns only that it was."""
    told = _from_werkzeug(error) if isinstance(error, HTTPException) else to_http_error(error)
    if told.status == 500:
        logger.error("%s %s failed", request.method, request.path, exc_info=error)
    body = error_body(told, request.path)
    return Response(body, status=told.status, headers=told.headers, content_type="application/json")


def _from_werkzeug(error: HTTPException) -> HttpError:
    limits = current_config().limits
    status = error.code or 500
    if status == 404:
        path = request.path[:100]
        return HttpError(404, f"There is no {path!r} here. OpenAI's API is under /v1, e.g. POST /v1/chat/completions.")
    if status == 405:
        allowed = ", ".join(sorted(getattr(error, "valid_methods", None) or ()))
        return HttpError(405, f"{request.method[:16]} is not allowed here, but: {allowed}.", headers={"Allow": allowed})
    if status == 413:
        most, flag = limits.max_body_bytes, flag_of("max_body_bytes")
        return HttpError(413, f"The request body is too large: at most {most} bytes ({flag}).")
    if status == 408:
        return body_too_slow(limits)
    return HttpError(status, error.name)
