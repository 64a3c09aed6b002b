"""trio-llm: an LLM inference engine and OpenAI-compatible server you can read."""

from __future__ import annotations

__version__ = "0.1.0"

# Types for checkers and editors are in __init__.pyi: an import here, even one that never runs, would join all floors.
_HOMES = {
    "Config": "trio_llm.config",
    "LLM": "trio_llm.llm",
    "PoolingParams": "trio_llm.params",
    "SamplingParams": "trio_llm.params",
    "StructuredOutputs": "trio_llm.params",
    "open_engine": "trio_llm.assemble",
}


def __getattr__(name: str) -> object:
    """Import what is asked for, and only that: `import trio_llm` stays instant."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
