"""GET / and the files of the page. They need no key, because they say nothing: the page asks its user for one."""

from __future__ import annotations

from pathlib import Path

from quart import Response
from quart_trio import QuartTrio

from trio_llm.server.http.static_files import StaticFiles

# Scripts and styles come from these files only and talk to this server only. No text becomes markup that DOMPurify has
# not seen.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)
ENDPOINTS = frozenset({"page", "page_file"})


def register(app: QuartTrio) -> None:
    """Add the page and its files."""
    files = StaticFiles(Path(__file__).with_name("files"), _POLICY)

    @app.get("/")
    async def page() -> Response:
        return files.answer("index.html")

    @app.get("/ui/<path:asset>")
    async def page_file(asset: str) -> Response:
        return files.answer(asset)
