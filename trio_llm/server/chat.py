"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import trio
from quart import Response
from quart_trio import QuartTrio

from trio_llm.engine import Delta, Stream
from trio_llm.errors import InvalidRequestError
from trio_llm.messages import ModelInfo
from trio_llm.server.body import read_body
from trio_llm.server.chat_template import MAX_RENDER_S
from trio_llm.server.generation import Head, StreamUsage, UsageCounter, answer, submit
from trio_llm.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from trio_llm.server.prompts import bad_word_ids, check_chars, fit, run
from trio_llm.server.requests import ChatBody, Message
from trio_llm.server.sampling import check_max_tokens, sampling_params
from trio_llm.server.services import Services

T = TypeVar("T")

_KIND = "chat.completion"
_CHUNK_KIND = "chat.completion.chunk"


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoint."""

    @app.post("/v1/chat/completions")
    async def create_chat_completion() -> Response | dict[str, Any]:
        return await chat(services, await read_body(ChatBody))


async def chat(services: Services, body: ChatBody) -> Response | dict[str, Any]:
    """Answer a checked body."""
    head = Head.make("chatcmpl", services.check_model(body.model))
    params = sampling_params(
        body,
        info=services.engine.info,
        bad_words=await bad_word_ids(services, body.bad_words),
        max_tokens=_max_tokens(body, services.engine.info),
        logprobs=_num_logprobs(body, services.config.engine.max_logprobs),
        prompt_logprobs=body.prompt_logprobs,
    )
    streams = await submit(services, body, [await chat_prompt(services, body)], params)
    names = TokenNames(services.tokenizer, as_ids=body.return_tokens_as_token_ids is True)
    echo = _flatten(body.messages[-1], "")["content"] if body.echo else ""
    return await answer(body, streams, _Format(head, body, streams, names, echo))


def _max_tokens(body: ChatBody, info: ModelInfo) -> int | None:
    """Return the limit; without one an answer may take what is left of the context."""
    if body.max_completion_tokens is not None:
        return check_max_tokens("max_completion_tokens", body.max_completion_tokens, info)
    if body.max_tokens == 0:
        raise InvalidRequestError("max_tokens = 0 is not allowed: at least 1.", param="max_tokens")
    return check_max_tokens("max_tokens", body.max_tokens, info)


def _num_logprobs(body: ChatBody, most: int) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs `logprobs=True`.", param="top_logprobs")
    if body.top_logprobs is not None and most >= 0 and not 0 <= body.top_logprobs <= most:
        raise InvalidRequestError(
            f"top_logprobs = {body.top_logprobs} is not allowed: 0 to {most}.", param="top_logprobs"
        )
    return (body.top_logprobs or 0) if body.logprobs else None


def _flatten(message: Message, path: str) -> dict[str, Any]:
    """Return a message as templates expect it: its content one text, whatever parts it came in."""
    if message.tool_calls or message.function_call:
        name = "tool_calls" if message.tool_calls else "function_call"
        raise InvalidRequestError(f"'{path}.{name}' is not supported by this server.", param=f"{path}.{name}")
    flat = {key: value for key, value in msgspec.structs.asdict(message).items() if value}
    if isinstance(message.content, list):
        for index, part in enumerate(message.content):
            if part.type != "text" or part.text is None:
                where = f"{path}.content[{index}]"
                raise InvalidRequestError(f"'{where}': only parts of type 'text' are supported.", param=where)
        flat["content"] = "\n".join(part.text or "" for part in message.content)
    flat.setdefault("content", "")
    return flat


async def chat_prompt(services: Services, body: ChatBody) -> list[int]:
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
    messages = [_flatten(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    for message in messages:
        check_chars(services, message["content"], "messages", body)
    continues = body.continue_final_message is True
    if continues and body.add_generation_prompt:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message exclude each other.", param="continue_final_message"
        )
    opens_turn = not continues and body.add_generation_prompt is not False

    def render() -> list[tuple[str, bool]]:
        variables = body.chat_template_kwargs or {}
        return template.render(
            messages, add_generation_prompt=opens_turn, continue_final_message=continues, variables=variables
        )

    segments = await _in_time(render)

    def encode() -> list[int]:
        beginning = services.tokenizer.encode("") if body.add_special_tokens else []
        return beginning + services.tokenizer.encode_segments(segments)

    ids = await run(services, encode, chars=sum(len(text) for text, _ in segments))
    return fit(services, ids, "messages", body)


async def _in_time(render: Callable[[], T]) -> T:
    """Give up on a template that loops without output, which only its thread could end."""
    with trio.move_on_after(2 * MAX_RENDER_S):
        return await trio.to_thread.run_sync(render, abandon_on_cancel=True)
    raise InvalidRequestError("The model's chat template takes too long on this conversation.", param="messages")


class _Format:
    """OpenAI's chat answer and chunks; one stream per choice."""

    def __init__(self, head: Head, body: ChatBody, streams: Sequence[Stream], names: TokenNames, echo: str) -> None:
        self._head = head
        self._body = body
        self._streams = streams
        self._names = names
        self._echo = echo
        self._begun = [False] * len(streams)
        self._counter = UsageCounter(streams, len(streams))
        self._usage = StreamUsage(body, self._counter)

    def answer(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for index, delta in enumerate(deltas):
            self._counter.add(index, delta)
            message = {"role": "assistant", "content": self._echo + delta.text, "refusal": None}
            choices.append(self._choice(index, "message", message, delta))
        whole = {**self._head.chunk(_KIND, choices), "usage": self._counter.usage()}
        if self._body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = prompt_logprobs(self._names, self._streams[0].prompt_logprobs or ())
        if self._body.return_token_ids:
            whole["prompt_token_ids"] = self._streams[0].prompt_token_ids
        return whole

    def chunks(self, index: int, delta: Delta) -> Sequence[dict[str, Any]]:
        self._counter.add(index, delta)
        chunks: list[dict[str, Any]] = []
        if not self._begun[index]:
            self._begun[index] = True
            first = {"role": "assistant", "content": self._echo}
            opening = self._head.chunk(_CHUNK_KIND, [_choice(index, "delta", first)])
            if self._body.return_token_ids:
                opening["prompt_token_ids"] = self._streams[0].prompt_token_ids
            chunks.append(opening)
        if delta.text or delta.finish_reason or self._body.logprobs or self._body.return_token_ids:
            choice = self._choice(index, "delta", {"content": delta.text} if delta.text else {}, delta)
            chunks.append(self._head.chunk(_CHUNK_KIND, [choice]))
        return [self._usage.mark(chunk) for chunk in chunks]

    def last_chunks(self) -> Sequence[dict[str, Any]]:
        return self._usage.last_chunks(self._head, _CHUNK_KIND)

    def _choice(self, index: int, key: str, content: dict[str, Any], delta: Delta) -> dict[str, Any]:
        choice = _choice(index, key, content)
        if delta.logprobs is not None:
            choice["logprobs"] = chat_logprobs(self._names, delta.logprobs)
        if delta.finish_reason is not None:
            choice["finish_reason"] = delta.finish_reason
            choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice


def _choice(index: int, key: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, key: content, "logprobs": None, "finish_reason": None}
