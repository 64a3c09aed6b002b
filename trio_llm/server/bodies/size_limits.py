"""Size limits of one request body. Errors name the limit and its flag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from msgspec import Struct

from trio_llm.config import LimitsConfig
from trio_llm.errors import InvalidRequestError


def too_much(what: str, limit: int, setting: str, param: str | None = None) -> InvalidRequestError:
    """Return the error for a value that exceeds a setting of `limits`."""
    return InvalidRequestError(f"{what}: at most {limit} ({flag_of(setting)}).", param=param)


def flag_of(setting: str) -> str:
    """Return the command-line flag of a limit."""
    return getattr(attrs.fields(LimitsConfig), setting).metadata["flags"][0]


def check_amounts(body: Struct, limits: LimitsConfig) -> None:
    """Check the size limits of a typed body.

    Raises:
        InvalidRequestError: Names the field, its size and the limit.
    """
    _at_most("n", getattr(body, "n", None) or 0, limits.max_n, "max_n")
    _check_count(body, "messages", limits.max_messages, "max_messages")
    _check_count(body, "stop_token_ids", limits.max_stop_token_ids, "max_stop_token_ids")
    _check_count(body, "logit_bias", limits.max_logit_bias, "max_logit_bias")
    _check_stop(getattr(body, "stop", None), limits)
    _check_metadata(getattr(body, "metadata", None) or {}, limits)


def schema_bounds(limits: LimitsConfig) -> Mapping[str, Mapping[str, Any]]:
    """Return the same limits as keywords of JSON schema, by field."""
    return {
        "n": {"maximum": limits.max_n},
        "messages": {"maxItems": limits.max_messages},
        "stop_token_ids": {"maxItems": limits.max_stop_token_ids},
        "logit_bias": {"maxProperties": limits.max_logit_bias},
        "stop": {"maxItems": limits.max_stop_strings},
        "metadata": {
            "maxProperties": limits.max_metadata_pairs,
            "propertyNames": {"maxLength": limits.max_metadata_key_chars},
            "additionalProperties": {"type": "string", "maxLength": limits.max_metadata_value_chars},
        },
    }


def _check_count(body: Struct, field: str, limit: int, setting: str) -> None:
    _at_most(field, len(getattr(body, field, None) or ()), limit, setting)


def _at_most(field: str, amount: int, limit: int, setting: str, param: str | None = None) -> None:
    if amount > limit:
        raise too_much(f"{field}: {amount} is too many", limit, setting, param or field)


def _check_stop(stop: str | Sequence[str] | None, limits: LimitsConfig) -> None:
    strings = (stop,) if isinstance(stop, str) else stop or ()
    if len(strings) > (limit := limits.max_stop_strings):
        raise too_much(f"{len(strings)} stop strings are too many", limit, "max_stop_strings", "stop")
    for string in strings:
        if not string:
            raise InvalidRequestError("stop strings must not be empty.", param="stop")
        _at_most("Bytes of a stop string", len(string.encode()), limits.max_stop_bytes, "max_stop_bytes", "stop")


def _check_metadata(metadata: Mapping[str, Any], limits: LimitsConfig) -> None:
    _at_most("metadata", len(metadata), limits.max_metadata_pairs, "max_metadata_pairs")
    for key, value in metadata.items():
        where, length = "Characters of a key of metadata", limits.max_metadata_key_chars
        _at_most(where, len(key), length, "max_metadata_key_chars", "metadata")
        if isinstance(value, str):
            where, length = f"Characters of metadata.{key}", limits.max_metadata_value_chars
            _at_most(where, len(value), length, "max_metadata_value_chars", f"metadata.{key}")
