"""What APIs in other words than chat's share: they become a chat, whose refusals then name their fields."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import attrs

from trio_llm.errors import InvalidRequestError


@contextmanager
def fields_renamed(names: Mapping[str, str]) -> Generator[None]:
    """Let refusals of the chat that a request became name the fields that the client sent.

    Args:
        names: Chat's name of each field -> the client's; the first that fits counts.
    """
    try:
        yield
    except InvalidRequestError as error:
        for name, own in names.items():
            if error.param is not None and error.param.startswith(name):
                # Where the client's name only goes on from chat's, the message is about the same words: "stop strings".
                message = error.message if own.startswith(name) else error.message.replace(name, own)
                raise attrs.evolve(error, message=message, param=error.param.replace(name, own)) from None
        raise


def new_id(prefix: str) -> str:
    """Make an id that nobody can guess."""
    return f"{prefix}_{secrets.token_hex(12)}"
