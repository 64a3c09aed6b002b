"""What the kernels for CPUs and for GPUs share: one directory of compiled kernels, and sources expanded to its keys.

A cache keyed by the text of a source alone would serve stale code after an edit of a header that it includes.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.M)


def directory() -> Path:
    """Return the directory of compiled kernels: `$TRIO_LLM_CACHE_DIR`, else the user's cache directory.

    Raises:
        FileNotFoundError: The user has no home directory.
    """
    given = os.environ.get("TRIO_LLM_CACHE_DIR")
    if given:
        return Path(given) / "kernels"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from None
    return cache / "trio-llm" / "kernels"


@functools.cache
def expand(*sources: Path) -> str:
    """Return the text of sources of one directory, with the headers there expanded, each once."""
    seen: set[str] = set()

    def include(found: re.Match[str]) -> str:
        if found[1] in seen:
            return ""
        seen.add(found[1])
        return body(sources[0].parent / found[1])

    def body(source: Path) -> str:
        text = source.read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(include, text)

    return "".join(map(body, sources))
