"""How much of everything one request may hold; whoever asks for more is told the number and the flag that moves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from msgspec import Struct

from trio_llm.config import LimitsConfig
from trio_llm.errors import InvalidRequestError


def too_much(what: str, most: int, setting: str, param: str | None = None) -> InvalidRequestError:
    """Return the refusal of what exceeds a setting of `limits`."""
    return InvalidRequestError(f"{what}: at most {most} ({flag_of(setting)}).", param=param)


def unknown_field(path: str) -> InvalidRequestError:
    """Return the refusal of a field that nobody here knows, where none is let pass."""
    return InvalidRequestError(f"Unknown field '{path[:64]}': none is let pass here (--strict).", param=path[:64])


def flag_of(setting: str) -> str:
    """Return the flag by which an operator moves a limit."""
    return getattr(attrs.fields(LimitsConfig), setting).metadata["flags"][0]


def check_amounts(body: Struct, limits: LimitsConfig) -> None:
    """Refuse a checked body of any kind that holds too much of something.

    Raises:
        InvalidRequestError: Names the field, how much there is, and what is allowed.
    """
    _at_most("n", getattr(body, "n", None) or 0, limits.max_n, "max_n")
    _check_count(body, "messages", limits.max_messages, "max_messages")
    _check_count(body, "stop_token_ids", limits.max_stop_token_ids, "max_stop_token_ids")
    _check_count(body, "logit_bias", limits.max_logit_bias, "max_logit_bias")
    _check_stop(getattr(body, "stop", None) or (), limits)
    _check_metadata(getattr(body, "metadata", None) or {}, limits)


def schema_bounds(limits: LimitsConfig) -> Mapping[str, Mapping[str, Any]]:
    """Return the same limits as JSON schema's keywords, by field."""
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


def _check_count(body: Struct, field: str, most: int, setting: str) -> None:
    _at_most(field, len(getattr(body, field, None) or ()), most, setting)


def _at_most(field: str, amount: int, most: int, setting: str, param: str | None = None) -> None:
    if amount > most:
        raise too_much(f"{field}: {amount} is too many", most, setting, param or field)


def _check_stop(stop: str | Sequence[str], limits: LimitsConfig) -> None:
    strings = (stop,) if isinstance(stop, str) else stop
    if len(strings) > (most := limits.max_stop_strings):
        raise too_much(f"{len(strings)} stop strings are too many", most, "max_stop_strings", "stop")
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
