"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import time

from quart import Response
from quart_trio import QuartTrio

from trio_llm.server.answers.models import Model, Models
from trio_llm.server.http.json_response import json_response
from trio_llm.server.services import Services


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoints."""
    created = int(time.time())

    def card(name: str) -> Model:
        longest = services.engine.info.max_model_len
        return Model(id=name, created=created, root=services.names[0], max_model_len=longest)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response(Models(data=[card(name) for name in services.names]))

    @app.get("/v1/models/<path:model>")
    async def get_model(model: str) -> Response:
        return json_response(card(services.check_model(model)))
