"""The import name for hypercorn's command line, `trio_llm.server.asgi:app`; the app is in `trio_llm.asgi`."""

from __future__ import annotations

from importlib import import_module

# Not an import statement: the composition root lies above this package.
app = import_module("trio_llm.asgi").app
