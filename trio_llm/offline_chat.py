"""Functions of the server for `LLM`: conversations to prompts, answers to messages, and structured outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import msgspec

from trio_llm.config import Config
from trio_llm.engine import Engine
from trio_llm.errors import InvalidRequestError
from trio_llm.offline import RequestOutput
from trio_llm.params import SamplingParams
from trio_llm.server.app import create_app
from trio_llm.server.bodies.pipeline import parse_body
from trio_llm.server.bodies.types import ChatBody
from trio_llm.server.constraints.rehearsal import compilers
from trio_llm.server.constraints.response_format import compile_grammar, structured_grammar
from trio_llm.server.openai.chat import PreparedChat, prepare_chat
from trio_llm.server.openai.chat_format import whole_message
from trio_llm.server.parsing.message import MessageParser, MessageStyle
from trio_llm.server.services import Services
from trio_llm.server.templates.render_pool import shared_pool


def make_services(engine: Engine, config: Config) -> Services:
    """Return the state for the server's functions, without a server."""
    return create_app(engine, config).services


def close_services() -> None:
    """End the processes that render templates and compile grammars. Another LLM starts its own when it needs them."""
    shared_pool().close()
    compilers().close()


async def compile_form(services: Services, params: SamplingParams) -> SamplingParams:
    """Return the parameters with their `structured_outputs` as a grammar.

    Raises:
        InvalidRequestError: There is not exactly one form, or it is invalid.
    """
    if params.structured_outputs is None:
        return params
    if params.grammar is not None:
        raise InvalidRequestError("structured_outputs and grammar exclude each other.", param="structured_outputs")
    grammar = await compile_grammar(services, structured_grammar(params.structured_outputs))
    return attrs.evolve(params, grammar=grammar, structured_outputs=None)


async def prepare_chats(
    services: Services, conversations: Sequence[Any], params: Sequence[SamplingParams], options: Mapping[str, Any]
) -> list[PreparedChat]:
    """Turn conversations into prompts.

    Args:
        conversations: Lists of messages in OpenAI's form.
        params: One per conversation.
        options: Fields of a chat completion's body, equal for all.

    Raises:
        InvalidRequestError: As in /v1/chat/completions, with the same message.
    """
    return [
        await prepare_chat(
            services,
            _body(services, {**options, "messages": conversation, "structured_outputs": _form(one)}),
            attrs.evolve(one, structured_outputs=None),
        )
        for conversation, one in zip(conversations, params, strict=True)
    ]


def _form(params: SamplingParams) -> dict[str, Any] | None:
    if params.structured_outputs is None:
        return None
    return attrs.asdict(params.structured_outputs, recurse=False)


def _body(services: Services, fields: Mapping[str, Any]) -> ChatBody:
    try:
        text = json.dumps(fields).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"The conversation cannot be written as JSON: {error}.", param="messages") from None
    return parse_body(text, ChatBody, services.config.limits)[0]


def read_messages(output: RequestOutput, style: MessageStyle) -> RequestOutput:
    """Return the output with each answer's text parsed as an assistant's message."""
    outputs = []
    for answer in output.outputs:
        parser = MessageParser(style)
        message = msgspec.to_builtins(whole_message(parser.feed(answer.text) + parser.finish()))
        outputs.append(attrs.evolve(answer, message=message))
    return attrs.evolve(output, outputs=tuple(outputs))
