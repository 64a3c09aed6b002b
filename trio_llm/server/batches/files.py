"""/v1/files: upload, list, read, delete. Files serve batches; each key sees its own."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import trio
from quart import Response, g, request
from quart_trio import QuartTrio

from trio_llm.errors import InvalidRequestError
from trio_llm.server.answers.stored import Deleted, Files
from trio_llm.server.batches.disk import Disk
from trio_llm.server.batches.file_store import StoredFile
from trio_llm.server.bodies.request_body import warn_of_unknown
from trio_llm.server.errors import HttpError
from trio_llm.server.generation.respond import Caller
from trio_llm.server.http.edge import upload_chunks
from trio_llm.server.http.json_response import json_response
from trio_llm.server.http.multipart import read_upload

_PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
_FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
_EXPIRY_S = range(3600, 2_592_001)
_CHUNK_BYTES = 1 << 20
# Maximum size of a form without its file.
_FORM_BYTES = 1 << 20


def register(app: QuartTrio, disk: Disk, max_file_bytes: int) -> None:
    """Add the endpoints."""

    @app.post("/v1/files")
    async def upload_file() -> Response:
        with Caller.current().deadline.enforced():
            return json_response((await _receive(disk, max_file_bytes)).to_openai())

    @app.get("/v1/files")
    async def list_files() -> Response:
        limit, after = page_arguments(10_000)
        purpose, order = request.args.get("purpose"), request.args.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequestError(f"order = {order[:20]!r} is not allowed: 'asc' or 'desc'.", param="order")
        newest_first = order == "desc"

        def work() -> tuple[list[StoredFile], bool]:
            return disk.files.page(owner=owner(), purpose=purpose, after=after, limit=limit, newest_first=newest_first)

        files, more = await disk.run(work)
        data = [file.to_openai() for file in files]
        return json_response(Files(data=data, has_more=more, **page_ends([file.id for file in data])))

    @app.get("/v1/files/<file_id>")
    async def get_file(file_id: str) -> Response:
        return json_response((await _find(disk, file_id)).to_openai())

    @app.get("/v1/files/<file_id>/content")
    async def get_file_content(file_id: str) -> Response:
        stored = await _find(disk, file_id)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(stored.bytes)}
        return Response(await open_files(disk, [file_id]), headers=headers)

    @app.delete("/v1/files/<file_id>")
    async def delete_file(file_id: str) -> Response:
        return json_response(Deleted(id=file_id, deleted=await disk.run(_delete, disk, file_id)))


def owner() -> str:
    """Return the id of the current request's API key, empty without keys."""
    return g.get("key_id") or ""


def page_arguments(max_limit: int) -> tuple[int, str | None]:
    """Read `limit` and `after` of the current request."""
    text = request.args.get("limit", "20" if max_limit <= 100 else str(max_limit))
    if not re.fullmatch(r"[0-9]{1,6}", text) or not 1 <= int(text) <= max_limit:
        raise InvalidRequestError(f"limit = {text[:20]!r} is not allowed: 1 to {max_limit}.", param="limit")
    return int(text), request.args.get("after")


def page_ends(ids: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a page that name its first and its last entry."""
    return {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}


async def _receive(disk: Disk, max_file_bytes: int) -> StoredFile:
    """Receive an upload. The limits are checked while it arrives."""
    if (request.content_length or 0) > max_file_bytes + _FORM_BYTES:
        raise _too_large(max_file_bytes)
    spool = await disk.run(partial(disk.files.create, "upload", "batch", owner=owner()))
    try:

        async def write(data: bytes) -> None:
            if spool.size_bytes + len(data) > max_file_bytes:
                raise _too_large(max_file_bytes)
            await disk.run(spool.write, data)

        # For another spelling of the path Quart has read the body; then the limit of ordinary bodies applies.
        chunks = upload_chunks(request.scope) or request.body
        upload = await read_upload(request.headers.get("Content-Type"), chunks, write)
        warn_of_unknown([name for name in upload.fields if name not in _FIELDS])
        spool.describe(
            filename=upload.filename or "upload",
            purpose=_purpose(upload.fields),
            expires_after_s=_expiry(upload.fields),
        )
        return await disk.run(spool.commit)
    finally:
        with trio.CancelScope(shield=True):
            await disk.run(spool.close)


def _too_large(max_file_bytes: int) -> HttpError:
    return HttpError(413, f"The file is too large: at most {max_file_bytes} bytes (--max-file-bytes).", param="file")


def _purpose(fields: dict[str, str]) -> str:
    purpose = fields.get("purpose")
    if purpose is None:
        raise InvalidRequestError("Missing required parameter: 'purpose'.", param="purpose")
    if purpose not in _PURPOSES:
        raise InvalidRequestError(
            f"purpose = {purpose[:40]!r} is not allowed: one of {', '.join(_PURPOSES)}.", param="purpose"
        )
    return purpose


def _expiry(fields: dict[str, str]) -> int | None:
    """Read expires_after[anchor] and expires_after[seconds], the form fields of OpenAI's clients."""
    text, anchor = fields.get("expires_after[seconds]", ""), fields.get("expires_after[anchor]", "created_at")
    if not fields.keys() & {"expires_after[seconds]", "expires_after[anchor]"}:
        return None
    if anchor != "created_at" or not re.fullmatch(r"[0-9]{1,9}", text) or int(text) not in _EXPIRY_S:
        raise InvalidRequestError(
            "expires_after must be {anchor: 'created_at', seconds: 3600 to 2592000}.", param="expires_after"
        )
    return int(text)


async def _find(disk: Disk, file_id: str) -> StoredFile:
    stored = await disk.run(disk.files.get, file_id, owner())
    if stored is None:
        raise _no_such_file(file_id)
    return stored


def _delete(disk: Disk, file_id: str) -> bool:
    """Delete a file of the current request's owner, in one storage call: no batch of it begins in between."""
    if disk.files.get(file_id, owner()) is None:
        raise _no_such_file(file_id)
    if disk.files.in_use(file_id):
        raise HttpError(409, f"File {file_id} is the input of a batch that has not ended.", param="file_id")
    return disk.files.delete(file_id, owner())


async def open_files(disk: Disk, file_ids: Sequence[str]) -> AsyncIterator[bytes]:
    """Open files for the current request; return their bytes in chunks, also of files that are deleted meanwhile.

    Raises:
        HttpError: 404, one of them is deleted.
    """
    files: list[BinaryIO] = []
    for file_id in file_ids:
        files.append(await disk.run(_open, disk, file_id))
        Caller.current().lifetime.stack.callback(files[-1].close)
    return _read(disk, files)


def _open(disk: Disk, file_id: str) -> BinaryIO:
    try:
        return disk.files.open(file_id)
    except FileNotFoundError:
        raise _no_such_file(file_id) from None


async def _read(disk: Disk, files: Sequence[BinaryIO]) -> AsyncIterator[bytes]:
    for file in files:
        while chunk := await disk.run(file.read, _CHUNK_BYTES):
            yield chunk


def _no_such_file(file_id: str) -> HttpError:
    return HttpError(404, f"No such file: {file_id[:80]!r}.", param="file_id")
