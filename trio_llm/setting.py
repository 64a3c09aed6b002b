"""How one setting is declared: default, limits, environment variable, flags and help (floor 0)."""

from __future__ import annotations

import math
from typing import Any

import attrs

from trio_llm.errors import ConfigError

# The limit of a number that has none of its own: up to here a float holds every integer.
_LARGEST = 2**53


def setting(
    default: Any,
    help: str,
    *,
    env: str | None = None,
    flags: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    power_of_two: bool = False,
    secret: bool = False,
) -> Any:
    """Declare one setting. `flags` are its command-line flags; messages show the first.

    A value out of range raises a ConfigError, whatever its source. A secret is never shown, not even by repr.
    """
    return attrs.field(
        default=default,
        validator=_check_limits,
        repr=(lambda value: "***" if value else repr(value)) if secret else True,
        metadata={
            "help": help,
            "env": env,
            "flags": flags,
            "at_least": at_least,
            "at_most": at_most,
            "power_of_two": power_of_two,
            "secret": secret,
        },
    )


def _check_limits(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if reason := out_of_range(attribute, value):
        raise ConfigError(key=attribute.name, value=value, source=type(instance).__name__, allowed=reason)


def out_of_range(attribute: attrs.Attribute[Any], value: Any) -> str | None:
    """Return which values a setting allows if `value` is not one of them, else None."""
    if value is None or not isinstance(value, int | float):
        return None
    low, high = attribute.metadata["at_least"], attribute.metadata["at_most"]
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if high is None and value > _LARGEST:
        return f"must be at most {_LARGEST}"
    if (low is not None and value < low) or (high is not None and value > high):
        return f"must be {low} to {high}" if high is not None else f"must be at least {low}"
    if attribute.metadata["power_of_two"] and int(value).bit_count() != 1:
        return "must be a power of two"
    return None
