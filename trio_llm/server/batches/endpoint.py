"""/v1/batches: OpenAI's form, over an uploaded file, and an inline form, over a list of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from quart import Response
from quart_trio import QuartTrio

from trio_llm.errors import InvalidRequestError
from trio_llm.server.answers.stored import Batch, Batches
from trio_llm.server.batches.disk import Disk
from trio_llm.server.batches.files import open_files, owner, page_arguments, page_ends
from trio_llm.server.batches.input_file import MAX_LINES
from trio_llm.server.batches.runner import BatchRunner
from trio_llm.server.bodies.request_body import read_body
from trio_llm.server.bodies.types import Metadata
from trio_llm.server.errors import HttpError
from trio_llm.server.http.json_response import json_response

_WINDOW_S = 86_400
_EndpointName = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
# The inline form writes endpoints without the version.
_SHORT_NAMES: Mapping[str, _EndpointName] = {
    "chat/completions": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
}


class OutputExpiry(Struct, kw_only=True):
    """When the result files are deleted.

    Attributes:
        anchor: From when the time counts.
        seconds: Time until the files are deleted.
    """

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=3600, le=2_592_000)]


class BatchBody(Struct, kw_only=True):
    """POST /v1/batches: `input_file_id`, or `prompts` with what their requests have in common.

    Attributes:
        input_file_id: Uploaded file with one request a line.
        endpoint: Which endpoint answers the lines.
        completion_window: Time until the batch expires.
        metadata: The client's own pairs of names and values.
        output_expires_after: When the result files are deleted.
        prompts: The prompts, instead of a file.
        model: Of `prompts`: served name of the model.
        max_tokens: Of `prompts`: longest answer, in tokens.
        temperature: Of `prompts`: randomness of sampling.
        top_p: Of `prompts`: sample from the likeliest tokens whose probabilities add up to this.
        seed: Of `prompts`: makes sampling repeatable.
        stop: Of `prompts`: texts that end an answer.
    """

    input_file_id: str | None = None
    endpoint: str
    completion_window: Literal["24h"] | None = None
    metadata: Metadata | None = None
    output_expires_after: OutputExpiry | None = None
    prompts: Annotated[list[str | list[int]], Meta(min_length=1, max_length=MAX_LINES)] | None = None
    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


_INLINE_ONLY = ("model", "max_tokens", "temperature", "top_p", "seed", "stop")


def register(app: QuartTrio, disk: Disk, runner: BatchRunner) -> None:
    """Add the endpoints."""

    @app.post("/v1/batches")
    async def create_batch() -> dict[str, Any]:
        body = await read_body(BatchBody)
        endpoint = _endpoint(body.endpoint)
        expires = body.output_expires_after

        def create(file_id: str) -> dict[str, Any]:
            return disk.batches.create(
                input_file_id=file_id,
                endpoint=endpoint,
                completion_window="24h",
                window_s=_WINDOW_S,
                metadata=body.metadata or {},
                output_expires_after_s=expires.seconds if expires is not None else None,
                owner=owner(),
            )

        def work() -> dict[str, Any]:
            # In one storage call: between a file and its batch, nobody deletes the file, and no client leaves.
            return _of_prompts(disk, body, endpoint, create) if body.prompts else create(_given_file(disk, body))

        batch = await disk.run(work)
        runner.notify()
        return batch

    @app.get("/v1/batches")
    async def list_batches() -> Response:
        limit, after = page_arguments(100)

        def work() -> tuple[list[dict[str, Any]], bool]:
            return disk.batches.page(owner=owner(), after=after, limit=limit)

        batches, more = await disk.run(work)
        data = msgspec.convert(batches, list[Batch])
        return json_response(Batches(data=data, has_more=more, **page_ends([batch.id for batch in data])))

    @app.get("/v1/batches/<batch_id>")
    async def get_batch(batch_id: str) -> dict[str, Any]:
        return _found(await disk.run(disk.batches.get, batch_id, owner()), batch_id)

    @app.post("/v1/batches/<batch_id>/cancel")
    async def cancel_batch(batch_id: str) -> dict[str, Any]:
        batch = _found(await disk.run(disk.batches.cancel, batch_id, owner()), batch_id)
        runner.interrupt(batch_id)
        return batch

    @app.get("/v1/batches/<batch_id>/results")
    async def get_batch_results(batch_id: str) -> Response:
        batch = _found(await disk.run(disk.batches.get, batch_id, owner()), batch_id)
        file_ids = [batch[name] for name in ("output_file_id", "error_file_id") if batch[name] is not None]
        # A failed batch has files if it failed after some of its lines were answered.
        if not file_ids and batch["status"] not in ("completed", "expired", "cancelled"):
            raise HttpError(409, f"Batch {batch_id} has no results: it is {batch['status']}.", param="batch_id")
        return Response(await open_files(disk, file_ids), content_type="application/jsonl")


def _endpoint(name: str) -> _EndpointName:
    endpoint = _SHORT_NAMES.get(name.removeprefix("/v1/"))
    if endpoint is None:
        allowed = ", ".join(_SHORT_NAMES.values())
        raise InvalidRequestError(f"endpoint = {name[:80]!r} is not allowed: one of {allowed}.", param="endpoint")
    return endpoint


def _found(batch: dict[str, Any] | None, batch_id: str) -> dict[str, Any]:
    if batch is None:
        raise HttpError(404, f"No such batch: {batch_id[:80]!r}.", param="batch_id")
    return batch


def _given_file(disk: Disk, body: BatchBody) -> str:
    """Return the id of the uploaded file a batch is to read."""
    for name in _INLINE_ONLY:
        if getattr(body, name) is not None:
            raise InvalidRequestError(f"'{name}' belongs into each line of the input file.", param=name)
    if body.input_file_id is None:
        raise InvalidRequestError("Missing required parameter: 'input_file_id' (or 'prompts').", param="input_file_id")
    if body.completion_window is None:
        raise InvalidRequestError("Missing required parameter: 'completion_window'.", param="completion_window")
    stored = disk.files.get(body.input_file_id, owner())
    if stored is None:
        raise InvalidRequestError(f"No such file: {body.input_file_id[:80]!r}.", param="input_file_id")
    if stored.purpose != "batch":
        raise InvalidRequestError(
            f"File {stored.id} was uploaded for {stored.purpose!r}, not for 'batch'.", param="input_file_id"
        )
    return stored.id


def _of_prompts(
    disk: Disk, body: BatchBody, endpoint: _EndpointName, create: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """Write the input file that the inline form stands for, and create its batch: both or neither."""
    if body.input_file_id is not None:
        raise InvalidRequestError("'input_file_id' and 'prompts' exclude each other.", param="prompts")
    common = {name: value for name in _INLINE_ONLY if (value := getattr(body, name)) is not None}
    if endpoint == "/v1/embeddings":
        for name in common:
            if name != "model":
                raise InvalidRequestError(f"'{name}' has no effect on embeddings.", param=name)
    with disk.files.create("prompts.jsonl", "batch", owner=owner()) as writer:
        for number, prompt in enumerate(body.prompts or []):
            request = {**common, **_as_field(endpoint, prompt)}
            line = {"custom_id": f"prompt-{number}", "method": "POST", "url": endpoint, "body": request}
            writer.write(msgspec.json.encode(line) + b"\n")
        return writer.commit_with(lambda: create(writer.id))


def _as_field(endpoint: _EndpointName, prompt: str | list[int]) -> dict[str, Any]:
    if endpoint == "/v1/chat/completions":
        if not isinstance(prompt, str):
            raise InvalidRequestError("The prompts of a chat are texts.", param="prompts")
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"input" if endpoint == "/v1/embeddings" else "prompt": prompt}
