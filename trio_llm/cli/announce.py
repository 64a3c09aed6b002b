"""Output of `trio-llm serve` for its user: progress, memory, access, and example commands."""

from __future__ import annotations

import ipaddress
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from trio_llm.config import Config
from trio_llm.model_info import ModelInfo, Progress

if TYPE_CHECKING:
    import rich.progress


class LoadingDisplay:
    """A bar on a terminal while a model loads; silent elsewhere. Called on the model's thread."""

    def __init__(self) -> None:
        self._bar: rich.progress.Progress | None = None
        self._tasks: dict[str, rich.progress.TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def report(self, progress: Progress) -> None:
        """Show the progress of loading."""
        if not sys.stderr.isatty():
            return
        bar = self._bar or self._start(progress)
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = bar.add_task(progress.stage, total=progress.total)
        bar.update(self._tasks[progress.stage], completed=progress.done)

    def _start(self, progress: Progress) -> rich.progress.Progress:
        from rich import progress as rich_progress
        from rich.console import Console

        amount = rich_progress.DownloadColumn() if progress.unit == "bytes" else rich_progress.MofNCompleteColumn()
        columns = ("[progress.description]{task.description}", rich_progress.BarColumn(), amount)
        self._bar = rich_progress.Progress(
            *columns, rich_progress.TimeRemainingColumn(), console=Console(stderr=True), transient=True
        )
        self._bar.start()
        return self._bar


def open_to_all(config: Config) -> str | None:
    """Return a warning if anyone can use the server; None if a key or a loopback address protects it."""
    if _needs_key(config) or _is_loopback(config.server.host):
        return None
    port = f"port {config.server.port}" if config.server.port else "its port"
    return (
        f"No API key is set and the server listens on {config.server.host}: whoever can reach this machine on "
        f"{port} can use the model. Set VLLM_API_KEY, or listen on --host 127.0.0.1."
    )


def _needs_key(config: Config) -> bool:
    return bool(config.auth.api_keys or config.auth.api_key_file or config.auth.admin_api_keys)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def ready_text(config: Config, info: ModelInfo, name: str, url: str) -> str:
    """Return the address, the memory table and example commands."""
    base = _reachable(url)
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if _needs_key(config) else ""
    post = f"-H 'Content-Type: application/json'{key}"
    page = f" In a browser: {base}/." if config.server.ui else ""
    return f"""{info.memory_table}

{name} ({info.architecture}, {info.dtype}, {info.max_model_len} tokens of context) is served on {url}.{page} Ask it:

  curl {base}/v1/chat/completions {post} \\
    -d '{{"messages": [{{"role": "user", "content": "What is the capital of Japan?"}}]}}'

  curl -N {base}/v1/completions {post} \\
    -d '{{"prompt": "Once upon a time", "max_tokens": 64, "stream": true}}'
"""


def _reachable(url: str) -> str:
    """Convert the listening address to one that this machine can connect to."""
    return url.replace("//0.0.0.0:", "//localhost:").replace("//[::]:", "//localhost:")
