"""/tokenize, /detokenize and /tokenizer_info: the model's own tokenizer, for clients that count or score tokens."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from msgspec import Meta, Struct
from quart import Response
from quart_trio import QuartTrio

from trio_llm.errors import InvalidRequestError
from trio_llm.server.answers.models import Detokenized, Tokenized
from trio_llm.server.bodies.request_body import read_body
from trio_llm.server.bodies.tools import MAX_TOOLS, RUNNABLE_TOOLS, ToolDefinition
from trio_llm.server.bodies.types import ChatBody, Message
from trio_llm.server.constraints.custom_tools import as_functions, offered
from trio_llm.server.generation.chat_prompt import chat_prompt
from trio_llm.server.generation.prompts import run
from trio_llm.server.http.json_response import json_response
from trio_llm.server.services import Services


class TokenizeBody(Struct, kw_only=True):
    """POST /tokenize: a text, or a conversation.

    Attributes:
        prompt: The text.
        messages: The conversation.
        model: Served name of the model; needed with `--strict` only.
        add_special_tokens: Put the tokenizer's control tokens round a text; true by default.
        add_generation_prompt: End a conversation with the beginning of the assistant's turn; true by default.
        continue_final_message: The last message is the beginning of the answer.
        chat_template_kwargs: Further variables of the chat template.
        tools: Functions and custom tools that the model may call.
        return_token_strs: Also report how the vocabulary spells the tokens.
    """

    runnable_tools: ClassVar[frozenset[str]] = RUNNABLE_TOOLS

    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[ToolDefinition], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Struct, kw_only=True):
    """POST /detokenize.

    Attributes:
        tokens: The token ids.
        model: Served name of the model; needed with `--strict` only.
    """

    tokens: list[int]
    model: str | None = None


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoints, each under its two paths."""
    tokenizer, info = services.tokenizer, services.engine.info

    @app.post("/tokenize")
    @app.post("/v1/tokenize", endpoint="tokenize_v1")
    async def tokenize() -> Response:
        body = await read_body(TokenizeBody)
        services.check_model(body.model)
        ids = await _tokenize(services, body)

        def answer() -> Response:
            strings = [tokenizer.token_string(token_id) for token_id in ids] if body.return_token_strs else None
            return json_response(
                Tokenized(count=len(ids), max_model_len=info.max_model_len, tokens=ids, token_strs=strings)
            )

        return await run(services, answer, chars=len(ids))  # The JSON can be megabytes.

    @app.post("/detokenize")
    @app.post("/v1/detokenize", endpoint="detokenize_v1")
    async def detokenize() -> Response:
        body = await read_body(DetokenizeBody)
        services.check_model(body.model)

        def answer() -> Response:
            for token_id in body.tokens:
                if not 0 <= token_id < info.vocab_size:
                    raise InvalidRequestError(
                        f"Token id {token_id} is not allowed: 0 to {info.vocab_size - 1}.", param="tokens"
                    )
            return json_response(Detokenized(prompt=tokenizer.decode(body.tokens, skip_special_tokens=False)))

        return await run(services, answer, chars=len(body.tokens))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": info.max_model_len,
            "chat_template": tokenizer.chat_template,
            **tokenizer.named_special_tokens,
        }


async def _tokenize(services: Services, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("Give one of 'prompt' and 'messages'.", param="prompt")
    if body.messages is not None:
        tools = offered(as_functions(services, body.tools)) if body.tools else None
        prompt = await chat_prompt(
            services,
            ChatBody(
                messages=body.messages,
                add_special_tokens=body.add_special_tokens,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs=body.chat_template_kwargs,
            ),
            tools,
        )
        return prompt.token_ids
    text = body.prompt or ""
    add_special = body.add_special_tokens is not False

    def encode() -> list[int]:
        return services.tokenizer.encode(text, add_special_tokens=add_special)

    return await run(services, encode, chars=len(text))
