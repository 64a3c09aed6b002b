"""From bytes to a typed body: strict JSON, known fields, types, then size limits.

HTTP requests and lines of batches both use it. It is synchronous and independent of HTTP: a large body is parsed in a
worker thread (see `request_body`).
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct

from trio_llm.config import LimitsConfig
from trio_llm.server.bodies.foreign_fields import hinted_fields, unsupported_fields
from trio_llm.server.bodies.foreign_tools import drop_foreign_tools
from trio_llm.server.bodies.size_limits import check_amounts
from trio_llm.server.bodies.strict_json import parse_object
from trio_llm.server.bodies.type_errors import field_error
from trio_llm.server.bodies.unknown_fields import ExtraField, check_fields

Body = TypeVar("Body", bound=Struct)


def parse_body(data: bytes, kind: type[Body], limits: LimitsConfig) -> tuple[Body, tuple[ExtraField, ...]]:
    """Parse and check the body of a request or of a batch's line.

    Returns:
        The typed body and its fields without effect, at most `unknown_fields.MAX_UNKNOWN` per object.

    Raises:
        InvalidRequestError: Not strict JSON; a field is wrong, missing, not supported, or in strict mode unknown; a
            limit is exceeded. Names the field.
    """
    # null is the same as absent
    given = {name: item for name, item in parse_object(data, limits).items() if item is not None}
    foreign = drop_foreign_tools(given, getattr(kind, "runnable_tools", None))
    extras = check_fields(given, kind, unsupported_fields(kind), hinted_fields(kind), strict=limits.strict)
    try:
        body = msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise field_error(error, given, kind) from None
    check_amounts(body, limits)
    return body, (*foreign, *extras)
