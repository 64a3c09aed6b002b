"""truncation "auto": leave the oldest turns out of a conversation that does not fit the context."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from trio_llm.errors import InvalidRequestError
from trio_llm.server.bodies.types import ChatBody, Message
from trio_llm.server.constraints.tool_choice import tool_use
from trio_llm.server.generation.chat_prompt import chat_prompt
from trio_llm.server.generation.respond import Caller
from trio_llm.server.services import Services


async def shortened(services: Services, body: ChatBody, caller: Caller) -> ChatBody:
    """Return a chat with as many of its last turns as leave room for the answer, and warn of those left out.

    A turn is a message of the user with all that answers it: a call stays with its result, and templates that begin
    with the user are content. Instructions stay. The last turn stays, even if it alone does not fit.
    """
    first, starts = _starts(body.messages)

    def without(turns: int) -> ChatBody:
        messages = body.messages if turns == 0 else body.messages[:first] + body.messages[starts[turns] :]
        return msgspec.structs.replace(body, messages=messages)

    if len(starts) < 2 or await _fits(services, body):
        return body
    fewest, most = 1, len(starts) - 1
    while fewest < most:
        middle = (fewest + most) // 2
        if await _fits(services, without(middle)):
            most = middle
        else:
            fewest = middle + 1
    caller.warn(f"truncation: the oldest {fewest} of {len(starts)} turns are left out")
    return without(fewest)


def _starts(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """Return where the conversation begins, behind its instructions, and where each turn does."""
    is_said = [message.role not in ("system", "developer") for message in messages]
    first = is_said.index(True) if True in is_said else len(messages)
    users = [index for index in range(first, len(messages)) if messages[index].role == "user"]
    return first, users if users[:1] == [first] else [first, *users]


async def _fits(services: Services, body: ChatBody) -> bool:
    try:
        prompt = await chat_prompt(services, body, tool_use(services, body).offered)
    except InvalidRequestError as error:
        if error.code != "context_length_exceeded":
            raise
        return False
    return len(prompt.token_ids) + (body.max_completion_tokens or 1) <= services.engine.info.max_model_len
