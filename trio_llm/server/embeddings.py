"""POST /v1/embeddings: vectors from the same engine, beside generation and in the same steps."""

from __future__ import annotations

import base64
import secrets
import struct
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NoReturn

import trio
from msgspec import Meta, Struct
from quart_trio import QuartTrio

from trio_llm.errors import InvalidRequestError
from trio_llm.messages import PoolingParams, Usage
from trio_llm.server.body import read_body
from trio_llm.server.generation import Caller
from trio_llm.server.prompts import run, split_prompts
from trio_llm.server.services import Services

# So many inputs of one request are in the engine at once: the rest waits here, not in the queue everybody shares.
_INPUTS_AT_ONCE = 32


class EmbeddingBody(Struct, kw_only=True):
    """POST /v1/embeddings. null is the same as absent."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoint."""

    @app.post("/v1/embeddings")
    async def create_embedding() -> dict[str, Any]:
        return await embed(services, await read_body(EmbeddingBody), Caller.current())


async def embed(services: Services, body: EmbeddingBody, caller: Caller) -> dict[str, Any]:
    """Answer a checked body."""
    model = services.check_model(body.model)
    width = services.engine.info.hidden_size
    if body.dimensions is not None and body.dimensions > width:
        raise InvalidRequestError(
            f"dimensions = {body.dimensions} is not allowed: this model's vectors have {width}.", param="dimensions"
        )
    params = PoolingParams(
        pooling=body.pooling or "mean", normalize=body.normalize is not False, dimensions=body.dimensions
    )
    inputs = await _inputs(services, body)
    services.hold(caller.lifetime, sum(map(len, inputs)))
    embed_one = partial(
        services.engine.embed,
        params=params,
        priority=body.priority or 0,
        salt=services.cache_scope(caller.key_id, None),
        background=caller.background,
        submitted=services.submitted(params),
    )
    with caller.deadline.kept():
        results = await _embed_all(inputs, embed_one)
    encode = _base64 if body.encoding_format == "base64" else list[float]
    prompt_tokens = sum(usage.prompt_tokens for _, usage in results)
    caller.lifetime.num_tokens.append(prompt_tokens)
    return {
        "id": f"embd-{secrets.token_hex(12)}",
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, (vector, _) in enumerate(results)
        ],
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


async def _inputs(services: Services, body: EmbeddingBody) -> list[list[int]]:
    """Return the token ids of each input."""
    longest = services.engine.info.max_model_len
    add_special = body.add_special_tokens is not False
    items = split_prompts(body.input, "input", services.config.limits.max_inputs, "max_inputs")
    texts = [item for item in items if isinstance(item, str)]
    for text in texts:
        at_least = services.tokenizer.min_tokens(text)
        if at_least > longest and body.truncate_prompt_tokens is None:
            _refuse_length(longest, f"at least {at_least}")
    encode = services.tokenizer.encode

    def work() -> list[list[int]]:
        return [encode(i, add_special_tokens=add_special) if isinstance(i, str) else i for i in items]

    # All at once: many short ones, one after the other, would hold the event loop as long as a long one.
    inputs = await run(services, work, chars=sum(map(len, texts)))
    return [_fit(ids, longest, body.truncate_prompt_tokens) for ids in inputs]


def _fit(ids: list[int], longest: int, keep: int | None) -> list[int]:
    """Truncate as the request asks, and refuse what is empty or too long."""
    if keep is not None:
        ids = ids[-(longest if keep == -1 else keep) :] if keep else []
    if not ids:
        raise InvalidRequestError("An input has no tokens: at least one is needed.", param="input")
    if len(ids) > longest:
        _refuse_length(longest, str(len(ids)))
    return ids


def _refuse_length(longest: int, count: str) -> NoReturn:
    raise InvalidRequestError(
        f"This model's maximum context length is {longest} tokens. However, your input resulted in {count} tokens.",
        param="input",
        code="context_length_exceeded",
    )


async def _embed_all(
    inputs: Sequence[Sequence[int]], embed_one: Callable[[Sequence[int]], Awaitable[tuple[tuple[float, ...], Usage]]]
) -> list[tuple[tuple[float, ...], Usage]]:
    """Embed inputs side by side; the first failure ends the others."""
    results: dict[int, tuple[tuple[float, ...], Usage]] = {}
    room = trio.Semaphore(_INPUTS_AT_ONCE)
    failure: list[Exception] = []

    async def one(index: int, ids: Sequence[int]) -> None:
        try:
            results[index] = await embed_one(ids)
        except Exception as error:  # noqa: BLE001 - one error is the request's, not a group of them
            failure.append(error)
            nursery.cancel_scope.cancel()
        finally:
            room.release()

    async with trio.open_nursery() as nursery:
        for index, ids in enumerate(inputs):
            await room.acquire()
            nursery.start_soon(one, index, ids)
    if failure:
        raise failure[0]
    return [results[index] for index in range(len(inputs))]


def _base64(vector: Sequence[float]) -> str:
    """Encode as little-endian float32, which openai-python asks for by default."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
