"""Turn a conversation into a prompt: convert messages for the template, render and tokenize off the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from trio_llm.errors import InvalidRequestError
from trio_llm.server.bodies.types import ChatBody, Message
from trio_llm.server.constraints.answer_grammar import Thinking
from trio_llm.server.generation.history import History, as_function, history
from trio_llm.server.generation.prompts import LONG_CHARS, check_chars, fit, run
from trio_llm.server.generation.respond import Caller
from trio_llm.server.generation.tool_prompt import with_tools
from trio_llm.server.services import Services


@attrs.frozen
class ChatPrompt:
    """A rendered conversation.

    Attributes:
        thinking: Whether the model thinks before it answers.
        unreadable: Paths of calls' arguments that are not a complete JSON object.
        answer: The end of the prompt that already belongs to the answer, by the response template.
    """

    token_ids: list[int]
    thinking: Thinking
    unreadable: Sequence[str] = ()
    answer: str = ""


async def chat_prompt(
    services: Services, body: ChatBody, tools: Sequence[Mapping[str, Any]] | None = None
) -> ChatPrompt:
    """Render and tokenize a conversation, in a thread: a template is a program and may not end.

    Raises:
        InvalidRequestError: The model has no template, the template refuses, or the prompt is too long.
    """
    template = services.template
    if template is None:
        raise InvalidRequestError(
            "This model has no chat template: use /v1/completions, or start the server with --chat-template.",
            param="messages",
        )
    continues = body.continue_final_message is True
    if continues and body.add_generation_prompt:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message exclude each other.", param="continue_final_message"
        )
    variables = _variables(services, body)
    if body.documents is not None and not services.knows_variable("documents"):
        raise InvalidRequestError("This model's chat template knows no documents.", param="documents")

    def render() -> tuple[list[tuple[str, bool]], History]:
        converted = history(body.messages, services.tool_form, services.config.limits)
        for message in converted.messages:
            check_chars(services, message["content"], "messages", body)
        own = services.prompts_for_tools
        return template.render(
            with_tools(converted.messages, tools) if own else converted.messages,
            tools=None if own else tools,
            documents=body.documents,
            add_generation_prompt=not continues and body.add_generation_prompt is not False,
            continue_final_message=continues,
            variables=variables,
        ), converted

    if not services.tokenizer.is_prepared:
        await services.threads.run(services.tokenizer.prepare, is_long=True)
    is_long = sum(map(_num_chars, body.messages)) > LONG_CHARS
    segments, converted = await services.rendering.run(render, is_long=is_long, abandon_on_cancel=True)

    def encode() -> list[int]:
        beginning = services.tokenizer.encode("") if body.add_special_tokens else []
        return beginning + services.tokenizer.encode_segments(segments)

    declared = services.response_template

    def answer() -> str:
        return declared.answer_begins("".join(text for text, _ in segments)) if declared is not None else ""

    num_chars = sum(len(text) for text, _ in segments)
    ids = fit(services, await run(services, encode, chars=num_chars), "messages", body)
    end = "".join(text for text, _ in segments[-2:]).rstrip()
    thinking = _thinking(services, end, continues=continues)
    return ChatPrompt(ids, thinking, converted.unreadable, await run(services, answer, chars=num_chars))


def _num_chars(message: Message) -> int:
    """Estimate the number of characters of a message."""
    content, calls = message.content or "", message.tool_calls or ()
    texts = [content] if isinstance(content, str) else [part.text or "" for part in content]
    for call in calls:
        given = as_function(call).arguments
        texts += [given] if isinstance(given, str) else [text for text in given.values() if isinstance(text, str)]
    return sum(map(len, texts))


def _thinking(services: Services, end: str, *, continues: bool) -> Thinking:
    """Detect from the end of the prompt whether the model thinks next: templates open thinking, or close it at once."""
    if (form := services.thinking) is None:
        return "none"
    if end.endswith((form.open, form.open + form.label)):
        return "begun"
    return "none" if continues or end.endswith(form.close) else "possible"


def warn_of_unreadable(caller: Caller, paths: Sequence[str]) -> None:
    """Warn of arguments that the model gets only in part, for example of a call that was cut short."""
    if paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        what = "Not a complete JSON object; the model gets the part that can be read"
        caller.warn(f"{what}: {paths[0]}{more}")


def _variables(services: Services, body: ChatBody) -> dict[str, Any]:
    """Return further variables for the template: the request's own, and the reasoning effort."""
    variables = dict(body.chat_template_kwargs or {})
    if (effort := body.reasoning_effort) is not None:
        if services.knows_variable("reasoning_effort"):
            variables.setdefault("reasoning_effort", effort)
        elif services.knows_variable("enable_thinking"):
            variables.setdefault("enable_thinking", effort != "none")
    return variables


def warn_of_effort(services: Services, caller: Caller, field: str, effort: str | None) -> None:
    """Warn if the effort has no effect: it is a hint that not every template uses."""
    adjustable = services.knows_variable("reasoning_effort") or services.knows_variable("enable_thinking")
    asks_for_nothing = effort is None or (effort == "none" and not services.thinks)
    if not adjustable and not asks_for_nothing:
        caller.warn(f"Ignored hints: {field} (this model's thinking cannot be adjusted)")
