"""/v1/files: upload, list, read, delete. Files serve batches; each key sees its own."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import trio
from quart import Response, g, request
from quart_trio import QuartTrio

from trio_llm.errors import InvalidRequestError
from trio_llm.server.body import warn_of_unknown
from trio_llm.server.disk import Disk
from trio_llm.server.edge import upload_chunks
from trio_llm.server.errors import HttpError
from trio_llm.server.multipart import read_upload
from trio_llm.server.storage.files import StoredFile

_PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
_FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
_EXPIRY_S = range(3600, 2_592_001)
_CHUNK_BYTES = 1 << 20
# What a form has beside its file, at most.
_FORM_BYTES = 1 << 20


def register(app: QuartTrio, disk: Disk, max_file_bytes: int) -> None:
    """Add the endpoints."""

    @app.post("/v1/files")
    async def upload_file() -> dict[str, Any]:
        return (await _receive(disk, max_file_bytes)).to_openai()

    @app.get("/v1/files")
    async def list_files() -> dict[str, Any]:
        limit, after = page_arguments(10_000)
        purpose, order = request.args.get("purpose"), request.args.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequestError(f"order = {order[:20]!r} is not allowed: 'asc' or 'desc'.", param="order")
        newest_first = order == "desc"

        def work() -> tuple[list[StoredFile], bool]:
            return disk.files.page(owner=owner(), purpose=purpose, after=after, limit=limit, newest_first=newest_first)

        files, more = await disk.run(work)
        return page_object([file.to_openai() for file in files], more)

    @app.get("/v1/files/<file_id>")
    async def get_file(file_id: str) -> dict[str, Any]:
        return (await _find(disk, file_id)).to_openai()

    @app.get("/v1/files/<file_id>/content")
    async def get_file_content(file_id: str) -> Response:
        stored = await _find(disk, file_id)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(stored.bytes)}
        return Response(read_files(disk, [file_id]), headers=headers)

    @app.delete("/v1/files/<file_id>")
    async def delete_file(file_id: str) -> dict[str, Any]:
        await _find(disk, file_id)
        if await disk.run(disk.files.in_use, file_id):
            raise HttpError(409, f"File {file_id} is the input of a batch that has not ended.", param="file_id")
        return {"id": file_id, "object": "file", "deleted": await disk.run(disk.files.delete, file_id, owner())}


def owner() -> str:
    """Return the id of the current request's API key, empty without keys."""
    return g.get("key_id") or ""


def page_arguments(most: int) -> tuple[int, str | None]:
    """Read `limit` and `after` of the current request."""
    text = request.args.get("limit", "20" if most <= 100 else str(most))
    if not re.fullmatch(r"[0-9]{1,6}", text) or not 1 <= int(text) <= most:
        raise InvalidRequestError(f"limit = {text[:20]!r} is not allowed: 1 to {most}.", param="limit")
    return int(text), request.args.get("after")


def page_object(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """Return OpenAI's list object."""
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": has_more}


async def _receive(disk: Disk, max_file_bytes: int) -> StoredFile:
    """Take an upload in. The limit holds while it arrives, not after."""
    if (request.content_length or 0) > max_file_bytes + _FORM_BYTES:
        raise _too_large(max_file_bytes)
    spool = await disk.run(disk.files.create, "upload", "batch")
    try:

        async def write(data: bytes) -> None:
            if spool.size_bytes + len(data) > max_file_bytes:
                raise _too_large(max_file_bytes)
            await disk.run(spool.write, data)

        # Quart has read it where the path came in another spelling; then the limit of ordinary bodies holds.
        chunks = upload_chunks(request.scope) or request.body
        upload = await read_upload(request.headers.get("Content-Type"), chunks, write)
        warn_of_unknown([name for name in upload.fields if name not in _FIELDS])
        spool.describe(
            filename=upload.filename or "upload",
            purpose=_purpose(upload.fields),
            owner=owner(),
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
    """Read expires_after[anchor] and expires_after[seconds], as OpenAI's clients spell them in a form."""
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
        raise HttpError(404, f"No such file: {file_id[:80]!r}.", param="file_id")
    return stored


async def read_files(disk: Disk, file_ids: Sequence[str]) -> AsyncIterator[bytes]:
    """Yield the bytes of files, one after the other, never a whole one."""
    for file_id in file_ids:
        with await disk.run(disk.files.open, file_id) as file:
            while chunk := await disk.run(file.read, _CHUNK_BYTES):
                yield chunk
