"""The app: registers every endpoint, and applies keys, limits, errors and headers to all of them."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import trio
from quart import Response, g, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from trio_llm.config import Config, ServerConfig
from trio_llm.engine import Engine
from trio_llm.errors import CheckpointError, ConfigError
from trio_llm.server import admin, requests
from trio_llm.server.access import auth
from trio_llm.server.access.rate_limits import RateLimits
from trio_llm.server.access.web_pages import WebPages
from trio_llm.server.anthropic import endpoint as messages
from trio_llm.server.background import Background
from trio_llm.server.batches import service as batch_service
from trio_llm.server.bodies.request_body import CONFIG, current_config
from trio_llm.server.bodies.size_limits import flag_of
from trio_llm.server.errors import HttpError, error_body, to_http_error
from trio_llm.server.fair_threads import CALLER, SHARE_OF
from trio_llm.server.http.cors import Cors
from trio_llm.server.http.edge import LIFETIME, Edge, Lifetime, body_too_slow
from trio_llm.server.http.proxies import TrustedProxies
from trio_llm.server.observability import stats_log, tracing
from trio_llm.server.observability.http_metrics import HttpMetrics
from trio_llm.server.openai import chat, completions, embeddings, models, render, responses, tokenization
from trio_llm.server.openapi import document as openapi
from trio_llm.server.parsing.response_template import ResponseTemplate, TemplateError
from trio_llm.server.probes import Probes
from trio_llm.server.services import Services, model_names
from trio_llm.server.templates.chat_template import ChatTemplate
from trio_llm.server.ui import live, page
from trio_llm.text_files import MAX_SETTINGS_BYTES, UnreadableFileError, read_text_file
from trio_llm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_REQUEST_ID_CHARS = 128
_HEALTH = frozenset({"health", "ready", "ping"})
# Open without a key.
_PUBLIC = _HEALTH | page.ENDPOINTS
# Polled every few seconds by monitors.
_PROBES = _HEALTH | {"metrics"}
_MAX_LOGGED_PATH_CHARS = 200
# These check access themselves.
_SELF_GUARDED = frozenset({"metrics", "shutdown"})


class ServerApp(QuartTrio):
    """The Quart app, its services and its rate limits."""

    services: Services
    rate_limits: RateLimits
    probes: Probes

    def last_call(self) -> None:
        """End open streams with an error event; see `serve`."""
        self.services.last_call()


def check_settings(config: Config) -> None:
    """Refuse what `create_app` would refuse and needs no model. Raises ConfigError."""
    auth.read_keys(config.auth)
    _read_template(config.server)
    tracing.check_endpoint(config.server)
    TrustedProxies.parse(config.server.trusted_proxies)
    Cors.configured(config.server)


def create_app(
    engine: Engine,
    config: Config,
    *,
    shutdown: Callable[[], None] | None = None,
    no_batches: str | None = None,
    clock: Callable[[], float] = trio.current_time,
) -> ServerApp:
    """Make the app that serves `engine`, ready for `serve` or any ASGI server on Trio.

    Args:
        engine: Must stay open while the app serves.
        config: Its sections server and auth are used here.
        shutdown: Begins a graceful shutdown of the process, for GET /shutdown.
        no_batches: Why there are no files and batches, for clients; None if there are.
        clock: Seconds, for the rate limit.

    Raises:
        ConfigError: A key file or chat template that cannot be read; no key although one is required; traces are
            wanted and OpenTelemetry is not installed.
        CheckpointError: A chat template that cannot be parsed.
    """
    keys = auth.load_keys(config.auth)
    app = ServerApp("trio_llm", static_folder=None)
    metrics = HttpMetrics(auth_enabled=bool(keys))
    app.services = Services(
        engine=engine,
        config=config,
        names=model_names(engine, config),
        template=_load_template(config, engine.tokenizer),
        response_template=_load_response_template(engine.tokenizer),
        shutdown=shutdown,
        keys=keys,
        background=Background(metrics.registry),
    )
    app.probes = Probes(app.services)
    _configure(app, config)
    _index_vocabulary(app)
    app.rate_limits = limits = RateLimits(config.auth, clock)
    _guard(app, limits)
    _finish_responses(app, metrics)
    admin.register(app, app.services, metrics.registry)
    for endpoints in (models, requests, completions, chat, render, responses, messages, embeddings, tokenization):
        endpoints.register(app, app.services)
    batch_service.register(app, app.services, limits, refusal=no_batches)
    app.services.tracing = tracing.register(app, app.services.background, engine, config, app.services.names[0])
    stats_log.register(app, app.services.background, engine.registry, config.server.log_stats_interval_s)
    openapi.register(app, config.limits, app.services.names[0])
    if config.server.ui:
        page.register(app)
        live.register(app, app.services)
    proxies = TrustedProxies.parse(config.server.trusted_proxies)
    app.asgi_app = Edge(app=app.asgi_app, limits=config.limits, proxies=proxies, cors=Cors.configured(config.server))
    return app


def _configure(app: ServerApp, config: Config) -> None:
    if app.services.prompts_for_tools:
        logger.info("The chat template knows no tools: a built-in prompt describes them (--tool-prompt)")
    app.json.sort_keys = False  # pyright: ignore[reportAttributeAccessIssue]
    app.config["RESPONSE_TIMEOUT"] = None  # Quart's default of a minute would silently cut a stream.
    app.config["BODY_TIMEOUT"] = config.limits.body_timeout_s
    app.config["MAX_CONTENT_LENGTH"] = config.limits.max_body_bytes
    app.config[CONFIG] = config
    app.register_error_handler(Exception, _error_response)


def _index_vocabulary(app: ServerApp) -> None:
    """Prepare for grammars before anything is served: the index holds the interpreter, and so the event loop."""

    def prepare() -> None:
        try:
            app.services.grammars.prepare()
        except Exception:
            logger.exception("The vocabulary cannot be indexed: no grammar can be used with this model")

    @app.before_serving
    async def index() -> None:
        await trio.to_thread.run_sync(prepare)


def _load_template(config: Config, tokenizer: Tokenizer) -> ChatTemplate | None:
    source, tool_source = tokenizer.chat_template, tokenizer.tool_template
    if (configured := _read_template(config.server)) is not None:
        source, tool_source = configured, None
    if source is None:
        return None
    try:
        template = ChatTemplate(source, tokenizer.named_special_tokens, config.limits, tool_source=tool_source)
    except CheckpointError as error:
        # A model with a broken template still completes prompts; a template from the settings must work.
        if config.server.chat_template is not None:
            raise
        logger.warning("%s: /v1/chat/completions is not available", error)
        return None
    return template


def _load_response_template(tokenizer: Tokenizer) -> ResponseTemplate | None:
    if tokenizer.response_template is None:
        return None
    where = "tokenizer_config.json: response_template"
    try:
        template = ResponseTemplate.load(tokenizer.response_template)
    except TemplateError as error:
        logger.warning("%s is not used; answers are read in the forms of the chat template: %s", where, error)
        return None
    if template.dropped:
        logger.warning("%s: no API has the fields %s: their text is dropped", where, ", ".join(template.dropped))
    return template


def _read_template(config: ServerConfig) -> str | None:
    """Return the chat template that the settings name; None if they name none."""
    if config.chat_template is None:
        return None
    try:
        return read_text_file(Path(config.chat_template), MAX_SETTINGS_BYTES)
    except UnreadableFileError as error:
        allowed = f"must be a readable text file ({error})"
        raise ConfigError("server.chat_template", config.chat_template, "configuration", allowed) from None


def _guard(app: ServerApp, limits: RateLimits) -> None:
    """Check key and rate before anything else, also on paths that do not exist."""
    services = app.services
    pages = WebPages.configured(services.config.server)

    @app.before_request
    async def guard() -> None:
        g.key_id = services.keys.identify(auth.presented_keys())
        caller = g.key_id or auth.peer_name()
        CALLER.set(caller)
        if request.endpoint in _PUBLIC:
            return
        if g.key_id is None:
            pages.check()
        if request.endpoint in _SELF_GUARDED:
            return
        if services.keys and g.key_id is None:
            raise HttpError(
                401,
                "A valid API key is needed: send it as `Authorization: Bearer <key>`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if g.key_id is not None or not auth.peer_is_loopback():
            SHARE_OF.set(caller)
            headers: dict[str, str] = {}
            g.rate_headers = headers
            limits.admit(caller, cast(Any, request.scope)[LIFETIME], headers)


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
        if request.endpoint not in _PROBES or app.services.config.server.log_probes:
            # Where no route matches, its label hides what was asked for: the path, as far as it is printable.
            path = labels[0] if rule is not None else quote(request.path)[:_MAX_LOGGED_PATH_CHARS]
            values = (labels[1], path, auth.peer_address(), response.status_code, request_id)
            logger.info("%s %s from %s %d, request %s", *values)
        return response


async def _error_response(error: Exception) -> Response:
    """Answer an error in the form of the API of its path; the client gets no details of an unexpected one."""
    failure = _from_werkzeug(error) if isinstance(error, HTTPException) else to_http_error(error)
    if failure.status == 500:
        logger.error("%s %s failed", request.method, request.path, exc_info=error)
    body = error_body(failure, request.path)
    return Response(body, status=failure.status, headers=failure.headers, content_type="application/json")


def _from_werkzeug(error: HTTPException) -> HttpError:
    limits = current_config().limits
    status = error.code or 500
    if status == 404:
        path = request.path[:100]
        under_v1 = "OpenAI's API is under /v1, e.g. POST /v1/chat/completions."
        hint = "GET /docs lists what there is." if path.startswith("/v1/") else under_v1
        return HttpError(404, f"There is no {path!r} here. {hint}")
    if status == 405:
        allowed = ", ".join(sorted(getattr(error, "valid_methods", None) or ()))
        return HttpError(405, f"{request.method[:16]} is not allowed here, but: {allowed}.", headers={"Allow": allowed})
    if status == 413:
        limit, flag = limits.max_body_bytes, flag_of("max_body_bytes")
        return HttpError(413, f"The request body is too large: at most {limit} bytes ({flag}).")
    if status == 408:
        return body_too_slow(limits)
    return HttpError(status, error.name)
