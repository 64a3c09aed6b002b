"""GET /docs: Swagger UI for the OpenAPI document, from files of this package; nothing is loaded from another host."""

from __future__ import annotations

from pathlib import Path

from quart import Response
from quart_trio import QuartTrio

from trio_llm.server.http.static_files import StaticFiles

# Scripts come from this server only, and may talk to it only. Swagger UI sets style attributes and has its pictures in
# its style sheet.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def register(app: QuartTrio) -> None:
    """Add the page and its files."""
    files = StaticFiles(Path(__file__).with_name("swagger_ui"), _POLICY)

    @app.get("/docs")
    async def docs() -> Response:
        return files.answer("index.html")

    @app.get("/docs/<asset>")
    async def docs_asset(asset: str) -> Response:
        return files.answer(asset)
