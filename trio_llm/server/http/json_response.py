"""Answers as HTTP responses."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct
from quart import Response


def json_response(answer: Response | Struct | Sequence[Struct], status: int = 200) -> Response:
    """Return one or several answers as a JSON response; a response, for example a stream, is returned unchanged."""
    if isinstance(answer, Response):
        return answer
    return Response(msgspec.json.encode(answer), status=status, content_type="application/json")
