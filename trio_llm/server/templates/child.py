"""The process that renders: it reads jobs and writes their results. Started by `render_pool`.

A template is a program from a model's directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2

from trio_llm.server.children.jobs import run_jobs
from trio_llm.server.templates import provenance
from trio_llm.server.templates.environment import Environment

_NOT_EMPTY = "\ue000"  # Replaces an empty final message while rendering, and is removed again.


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
    run_jobs(_result)
