"""Logs: one event a line, for people on a terminal, JSON anywhere else. Prompts and outputs are never logged."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from pathlib import Path

import structlog

from trio_llm.errors import ConfigError

_SHARED: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]
_MAX_FILE_BYTES, _OLD_FILES = 64 * 2**20, 4


def configure_logging(level: str, log_dir: str | None) -> None:
    """Send structlog's and the standard library's events to stderr, and to `log_dir`/trio-llm.log if there is one.

    Raises:
        ConfigError: The directory cannot be written.
    """
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    stderr = logging.StreamHandler()
    stderr.setFormatter(_console() if sys.stderr.isatty() else _json())
    handlers: list[logging.Handler] = [stderr]
    if log_dir is not None:
        handlers.append(_file(log_dir))
    logging.basicConfig(level=level.upper(), handlers=handlers, force=True)
    logging.captureWarnings(True)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # huggingface_hub's: a line for every request


def set_level(level: str) -> None:
    """Change the level of a configured log."""
    logging.getLogger().setLevel(level.upper())


def _console() -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        processor=structlog.dev.ConsoleRenderer(colors=True, exception_formatter=structlog.dev.plain_traceback),
        foreign_pre_chain=_SHARED,
    )


def _json() -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        foreign_pre_chain=_SHARED,
    )


def _file(log_dir: str) -> logging.Handler:
    path = Path(log_dir) / "trio-llm.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=_MAX_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8"
        )
    except OSError as error:
        raise ConfigError("server.log_dir", log_dir, "settings", f"cannot be written: {error}") from None
    handler.setFormatter(_json())
    return handler
