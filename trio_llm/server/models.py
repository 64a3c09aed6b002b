"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import time
from typing import Any

from quart_trio import QuartTrio

from trio_llm.server.services import Services


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoints."""
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "trio-llm",
            "root": services.names[0],
            "parent": None,
            "max_model_len": services.engine.info.max_model_len,
            "permission": [],
        }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in services.names]}

    @app.get("/v1/models/<path:model>")
    async def get_model(model: str) -> dict[str, Any]:
        return card(services.check_model(model))
