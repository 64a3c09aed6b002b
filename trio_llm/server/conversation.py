"""A conversation becomes a prompt: messages as the template expects them, rendered and tokenized off the loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import msgspec
import trio

from trio_llm.config import LimitsConfig
from trio_llm.errors import InvalidRequestError
from trio_llm.server.answer_grammar import Thinking
from trio_llm.server.chat_template import too_slow
from trio_llm.server.parsing.reasoning import CLOSE, OPEN
from trio_llm.server.prompts import check_chars, fit, run
from trio_llm.server.requests import ChatBody, Message
from trio_llm.server.services import Services

T = TypeVar("T")


@attrs.frozen
class ChatPrompt:
    """A rendered conversation, and whether the model thinks before it answers it."""

    token_ids: list[int]
    thinking: Thinking


async def chat_prompt(
    services: Services, body: ChatBody, tools: Sequence[Mapping[str, Any]] | None = None
) -> ChatPrompt:
    """Render and tokenize a conversation, in a thread: a template is a program, and some never end.

    Raises:
        InvalidRequestError: The model has no template, it refuses, or the prompt is too long.
    """
    template = services.template
    if template is None:
        raise InvalidRequestError(
            "This model has no chat template: use /v1/completions, or start the server with --chat-template.",
            param="messages",
        )
    messages = [flatten(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    for message in messages:
        check_chars(services, message["content"], "messages", body)
    continues = body.continue_final_message is True
    if continues and body.add_generation_prompt:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message exclude each other.", param="continue_final_message"
        )
    variables = _variables(services, body)
    if body.documents is not None and not services.knows_variable("documents"):
        raise InvalidRequestError("This model's chat template knows no documents.", param="documents")

    def render() -> list[tuple[str, bool]]:
        return template.render(
            messages,
            tools=tools,
            documents=body.documents,
            add_generation_prompt=not continues and body.add_generation_prompt is not False,
            continue_final_message=continues,
            variables=variables,
        )

    segments = await _in_time(render, services.config.limits)

    def encode() -> list[int]:
        beginning = services.tokenizer.encode("") if body.add_special_tokens else []
        return beginning + services.tokenizer.encode_segments(segments)

    ids = await run(services, encode, chars=sum(len(text) for text, _ in segments))
    end = "".join(text for text, _ in segments[-2:]).rstrip()
    return ChatPrompt(fit(services, ids, "messages", body), _thinking(services, end, continues=continues))


def _thinking(services: Services, end: str, *, continues: bool) -> Thinking:
    """Tell by the end of the prompt whether thinking comes next: templates open it, and close it to prevent it."""
    if not services.thinks:
        return "none"
    if end.endswith(OPEN):
        return "begun"
    return "none" if continues or end.endswith(CLOSE) else "possible"


def _variables(services: Services, body: ChatBody) -> dict[str, Any]:
    """Return the template's further variables: the request's own, and how much it is to think."""
    variables = dict(body.chat_template_kwargs or {})
    if (effort := body.reasoning_effort) is not None:
        if services.knows_variable("reasoning_effort"):
            variables.setdefault("reasoning_effort", effort)
        elif services.knows_variable("enable_thinking"):
            variables.setdefault("enable_thinking", effort != "none")
        elif effort != "none" or services.thinks:
            raise InvalidRequestError(
                f"reasoning_effort = {effort!r}: this model's thinking cannot be adjusted.", param="reasoning_effort"
            )
    return variables


def flatten(message: Message, path: str) -> dict[str, Any]:
    """Return a message as templates expect it: its content one text, its calls' arguments objects."""
    flat: dict[str, Any] = {key: value for key, value in msgspec.structs.asdict(message).items() if value}
    if isinstance(message.content, list):
        for index, part in enumerate(message.content):
            if part.type != "text" or part.text is None:
                where = f"{path}.content[{index}]"
                raise InvalidRequestError(f"'{where}': only parts of type 'text' are supported.", param=where)
        flat["content"] = "\n".join(part.text or "" for part in message.content)
    if message.tool_calls:
        flat["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
            for index, call in enumerate(message.tool_calls)
            for where in [f"{path}.tool_calls[{index}].function.arguments"]
            for arguments in [call_arguments(call.function.arguments, where)]
        ]
    if message.reasoning and not message.reasoning_content:
        flat["reasoning_content"] = message.reasoning
    flat.setdefault("content", flat.pop("refusal", ""))
    return flat


def call_arguments(given: str | dict[str, Any], path: str) -> dict[str, Any]:
    """Return a call's arguments as an object: templates write them out as JSON themselves."""
    if isinstance(given, dict):
        return given
    try:
        value = json.loads(given or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"'{path}' must be the text of a JSON object.", param=path)
    return value  # pyright: ignore[reportUnknownVariableType] - whatever JSON it is


async def _in_time(render: Callable[[], T], limits: LimitsConfig) -> T:
    """Give up on a template that loops without output, which only its thread could end."""
    with trio.move_on_after(2 * limits.template_timeout_s):  # One that writes something ends itself after the time.
        return await trio.to_thread.run_sync(render, abandon_on_cancel=True)
    raise too_slow(limits)
