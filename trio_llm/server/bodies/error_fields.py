"""Rename chat fields in errors to the client's, for APIs that convert their requests to a chat."""

from __future__ import annotations

import re
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import attrs

from trio_llm.errors import InvalidRequestError


@contextmanager
def fields_renamed(names: Mapping[str, str]) -> Generator[None]:
    """Make errors about a chat name the fields of the client's request.

    Args:
        names: The chat's field -> the client's; the first match is used.
    """
    try:
        yield
    except InvalidRequestError as error:
        for name, own in names.items():
            if error.param is not None and error.param.startswith(name):
                # Where the client's name only goes on from chat's, the message is about the same words: "stop strings".
                # A flag keeps its name: there is a --max-messages and no --max-input.
                message = error.message
                if not own.startswith(name):
                    message = re.sub(rf"(?<![\w-]){re.escape(name)}", own, message)
                raise attrs.evolve(error, message=message, param=error.param.replace(name, own)) from None
        raise


def new_id(prefix: str) -> str:
    """Make an id that cannot be guessed."""
    return f"{prefix}_{secrets.token_hex(12)}"
