"""The process that renders: it reads jobs and writes their results. Started by `render_pool`.

A template is a program from a model's directory. The kernel bounds it: SIGPROF ends the process when its CPU time is
used up, and an allocation beyond the limit fails.
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from trio_llm.server.templates import provenance
from trio_llm.server.templates.environment import Environment
from trio_llm.server.templates.frames import frame, read_frame

_NOT_EMPTY = "\ue000"  # Replaces an empty final message while rendering, and is removed again.


def main() -> None:
    """Run jobs until the other side closes the pipe."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # An ignored signal is inherited from the parent.
    # systemd sends it to every process of a service; the server still renders while it drains.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    while True:
        try:
            job = read_frame(sys.stdin.buffer)
        except EOFError:
            return
        _limit_memory(job["memory_bytes"])
        signal.setitimer(signal.ITIMER_PROF, job["cpu_s"])
        result = _result(job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(frame(result))
        sys.stdout.buffer.flush()


def _limit_memory(more_bytes: int) -> None:
    """Limit the address space to `more_bytes` above the current size."""
    try:
        used_bytes = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:  # Only Linux has it.
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + more_bytes, hard))


def _result(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compile, and render if there is a conversation; a template's exception is a result too."""
    try:
        template = _compiled(job["source"])
        if "messages" not in job:
            return {}
        text = _render(template, job)
        if len(text) > job["max_chars"]:
            return {"error": "too_long"}
        if job["continue_final_message"]:
            cut = provenance.up_to_final(text)
            if cut is None:
                return {"error": "no_final"}
            text = cut.removesuffix(_NOT_EMPTY)
        return {"segments": provenance.segments(text)}
    except MemoryError:
        return {"error": "memory"}
    except RecursionError:
        return {"error": "recursion"}
    except Exception as error:  # noqa: BLE001 - a template may raise whatever Python can
        return {"error": "refused", "reason": str(error)[:500] or type(error).__name__}


@lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
    return Environment().from_string(source)


def _render(template: jinja2.Template, job: Mapping[str, Any]) -> str:
    """Render up to slightly more than the maximum length."""
    pieces: list[str] = []
    chars = 0
    for piece in template.generate(_context(job)):
        pieces.append(piece)
        chars += len(piece)
        if chars > job["max_chars"]:
            break
    return provenance.concat(pieces)


def _context(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables: roles and named tokens are marked as the template's text, others are not."""
    messages = [{**message, "role": provenance.from_template(message["role"])} for message in job["messages"]]
    if job["continue_final_message"]:
        content = messages[-1].get("content") or _NOT_EMPTY
        messages[-1]["content"] = provenance.TemplateText(content, provenance.FINAL * len(content))
    tokens = {name: provenance.from_template(token) for name, token in job["tokens"].items()}
    return {
        **job["variables"],
        **tokens,
        "messages": messages,
        "tools": job["tools"],
        "documents": job["documents"],
        "add_generation_prompt": job["add_generation_prompt"],
    }


if __name__ == "__main__":
    main()
