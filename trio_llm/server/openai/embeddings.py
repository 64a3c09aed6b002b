"""POST /v1/embeddings: vectors from the same engine, in the same steps as generation."""

from __future__ import annotations

import base64
import secrets
import struct
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import trio
from msgspec import Meta, Struct
from quart import Response
from quart_trio import QuartTrio

from trio_llm.engine.admission import check_pooling
from trio_llm.errors import InvalidRequestError
from trio_llm.messages import Usage
from trio_llm.params import PoolingParams, Submission, check_prompt_length
from trio_llm.server.answers.models import Embeddings, PromptUsage, Vector
from trio_llm.server.bodies.error_fields import fields_renamed
from trio_llm.server.bodies.request_body import read_body
from trio_llm.server.generation.prompts import encode_texts, kept_tokens, run, split_prompts
from trio_llm.server.generation.respond import Caller, all_of
from trio_llm.server.services import Services

# Inputs of one request in the engine at once: the rest waits here, not in the shared queue.
_INPUTS_AT_ONCE = 32
# A number is written in 0.1 microseconds, a character tokenized in 2.
_NUMBERS_PER_CHAR = 16


class EmbeddingBody(Struct, kw_only=True):
    """POST /v1/embeddings. null is the same as absent.

    Attributes:
        input: A text, a list of texts, a list of token ids, or a list of such lists.
        model: Served name of the model; needed with `--strict` only.
        encoding_format: "float" for numbers, "base64" for little-endian float32 in base64.
        dimensions: Keep this many numbers of each vector.
        pooling: "mean" of the last layer's rows, or its "last" row.
        normalize: Scale vectors to length 1; true by default.
        truncate_prompt_tokens: Keep this many tokens at the end of an input; -1 for as many as fit.
        add_special_tokens: Put the tokenizer's control tokens round the input; true by default.
        priority: Lower is served first, with `--scheduling-policy priority`.
        user: Name of the caller's own; without effect.
    """

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
    async def create_embedding() -> Response:
        return await embed(services, await read_body(EmbeddingBody), Caller.current())


async def embed(services: Services, body: EmbeddingBody, caller: Caller) -> Any:
    """Answer a checked body, as the caller encodes answers."""
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
    services.hold(caller.lifetime, min(len(inputs), _INPUTS_AT_ONCE), sum(map(len, inputs)))
    salt = services.cache_scope(caller.key_id, None)
    submissions = [
        Submission(ids, params, priority=body.priority or 0, background=caller.background, salt=salt) for ids in inputs
    ]
    submitted = services.submitted(params)

    async def embed_one(submission: Submission) -> tuple[tuple[float, ...], Usage]:
        vector, usage = await services.engine.embed(submission, submitted=submitted)
        # Charged at once: what was computed counts, however the other inputs end.
        caller.lifetime.num_tokens.append(usage.prompt_tokens)
        return vector, usage

    with caller.deadline.enforced(), fields_renamed({"prompt": "input"}):
        for submission in submissions:  # Before any is computed. One body may have a million token ids.
            check_pooling(submission, services.engine.limits)
            await trio.lowlevel.checkpoint()
        results = await all_of([partial(embed_one, one) for one in submissions], _INPUTS_AT_ONCE)
    encode = _base64 if body.encoding_format == "base64" else list[float]
    prompt_tokens = sum(usage.prompt_tokens for _, usage in results)

    def work() -> Any:
        answer = Embeddings(
            id=f"embd-{secrets.token_hex(12)}",
            model=model,
            data=[Vector(index=index, embedding=encode(vector)) for index, (vector, _) in enumerate(results)],
            usage=PromptUsage(prompt_tokens=prompt_tokens, total_tokens=prompt_tokens),
        )
        return caller.encode(answer)

    return await run(services, work, chars=len(results) * width // _NUMBERS_PER_CHAR)


async def _inputs(services: Services, body: EmbeddingBody) -> list[list[int]]:
    """Return the token ids of each input."""
    longest = services.engine.info.max_model_len
    items = split_prompts(body.input, "input", services.config.limits.max_inputs, "max_inputs")
    texts = [item for item in items if isinstance(item, str)]
    for text in texts:
        if body.truncate_prompt_tokens is None:
            check_prompt_length(
                services.tokenizer.min_tokens(text), longest, generates=False, name="input", at_least=True
            )
    inputs = await encode_texts(services, items, add_special_tokens=body.add_special_tokens is not False)
    return [_fit(ids, longest, body.truncate_prompt_tokens) for ids in inputs]


def _fit(ids: list[int], longest: int, truncate: int | None) -> list[int]:
    """Truncate as requested, and refuse inputs that are empty or too long."""
    if (keep := kept_tokens(truncate, longest)) is not None:
        ids = ids[-keep:]
    check_prompt_length(len(ids), longest, generates=False, name="input")
    return ids


def _base64(vector: Sequence[float]) -> str:
    """Encode as little-endian float32, the default of openai-python."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
