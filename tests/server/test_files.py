"""/v1/files over a real socket: uploads are stored as they come, bounded, and each key sees its own."""

from __future__ import annotations

import errno
import io
import json
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import trio

from tests.server.client import use_client
from tests.server.helpers import Running, http, read_response, running
from tests.server.stub import StubRunner, open_stub
from trio_llm.config import AuthConfig, Config, LimitsConfig, ServerConfig
from trio_llm.server.app import create_app
from trio_llm.server.batches import files
from trio_llm.server.batches.disk import Disk
from trio_llm.server.batches.file_store import FileWriter, StoredFile
from trio_llm.server.http import edge

KEYS = ("sk-0123456789abcdef", "sk-fedcba9876543210")
MIB = 1024 * 1024


@asynccontextmanager
async def serving(directory: Path, **settings: Any) -> AsyncIterator[Running]:
    """Serve with files in a directory."""
    config = Config(
        server=ServerConfig(data_dir=str(directory)), limits=LimitsConfig(**settings), auth=AuthConfig(api_keys=KEYS)
    )
    async with open_stub(StubRunner()) as engine, running(create_app(engine, config)) as server:
        yield server


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    """Serve files of at most 4 MiB."""
    async with serving(tmp_path, max_file_bytes=4 * MIB) as server:
        yield server


def stored(directory: Path) -> list[str]:
    """List what lies on the disk."""
    return [path.name for path in (directory / "files").iterdir()]


def head(size: int, *headers: str, key: str = KEYS[0]) -> bytes:
    """Return the head of an upload of so many bytes, and the part of the form before the file's bytes."""
    lines = [
        "POST /v1/files HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {key}",
        "Content-Type: multipart/form-data; boundary=B",
        f"Content-Length: {size + len(FORM) + len(END)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + FORM


FORM = (
    b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
)
END = b"\r\n--B--\r\n"


async def test_a_file_from_upload_to_deletion(server: Running, tmp_path: Path) -> None:
    """The openai client creates, retrieves, lists, reads and deletes a file; every byte comes back."""
    data = bytes(range(256)) * 9000 + b"\r\n--B\r\n--\r\n"

    def use(client: openai.OpenAI) -> tuple[Any, ...]:
        created = client.files.create(file=("../../etc/pässwd", io.BytesIO(data)), purpose="batch")
        same = client.files.retrieve(created.id)
        listed = client.files.list(purpose="batch", limit=1, order="asc")
        content = client.files.content(created.id).read()
        deleted = client.files.delete(created.id)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(created.id)
        return created, same, listed.data, content, deleted

    created, same, listed, content, deleted = await use_client(server, use, KEYS[0])
    assert (created.bytes, created.filename, created.purpose, created.status) == (
        len(data), "../../etc/pässwd", "batch", "processed",
    )  # fmt: skip
    assert same == created
    assert listed == [created]
    assert content == data
    assert deleted.deleted
    assert stored(tmp_path) == []


async def test_listing_pages(server: Running) -> None:
    """Pages follow each other by `after`, newest first or oldest first, and filter by purpose."""

    def use(client: openai.OpenAI) -> tuple[list[str], list[str], list[str], list[str]]:
        made = [client.files.create(file=b"%d" % i, purpose="batch").id for i in range(5)]
        other = client.files.create(
            file=b"x", purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert other.expires_at == other.created_at + 3600
        listed = [file.id for file in client.files.list(limit=2, purpose="batch")]
        ordered = [file.id for file in client.files.list(limit=2, order="asc")]
        return made, listed, ordered, [*made, other.id]

    made, listed, ordered, everything = await use_client(server, use, KEYS[0])
    assert listed == made[::-1]
    assert ordered == everything


async def test_keys_see_their_own_files(server: Running) -> None:
    """A file of one key does not exist for another: not by id, not in the list, not for a batch."""
    mine = await use_client(server, lambda client: client.files.create(file=b"{}", purpose="batch"), KEYS[0])

    def use(client: openai.OpenAI) -> None:
        assert client.files.list().data == []
        for method in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                method(mine.id)
        with pytest.raises(openai.BadRequestError):
            client.batches.create(input_file_id=mine.id, endpoint="/v1/completions", completion_window="24h")

    await use_client(server, use, KEYS[1])
    assert (await use_client(server, lambda client: client.files.retrieve(mine.id), KEYS[0])) == mine


@pytest.mark.parametrize("name", ["file-1", "../x", "%2e%2e%2fx", "file-" + "a" * 32, "x" * 300, "%00", "CON"])
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("DELETE", ""), ("GET", "/content")])
async def test_made_up_ids_are_not_found(server: Running, name: str, method: str, suffix: str) -> None:
    """H-F10: no id leads anywhere but to a file of ours; the answer is a 404 or a 405 and never an error of ours."""
    stream = await server.connect()
    await stream.send_all(http(method, f"/v1/files/{name}{suffix}", b"", f"Authorization: Bearer {KEYS[0]}"))
    status, _, _ = await read_response(stream)
    assert status in {404, 405}


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{}", "application/json", 415),
        (b"--B--\r\n", "multipart/form-data", 415),
        (b"--B--\r\n", "multipart/form-data; boundary=B", 400),
        (b"nothing of the kind", "multipart/form-data; boundary=B", 400),
        (FORM.replace(b"batch", b"theft") + END, "multipart/form-data; boundary=B", 400),
        (FORM.split(b"\r\n", 3)[3].replace(b"batch\r\n", b"") + END, "multipart/form-data; boundary=B", 400),
        (FORM + b"a" + END[:-4], "multipart/form-data; boundary=B", 400),
        (FORM.replace(b"batch", b"b" * 100_000) + END, "multipart/form-data; boundary=B", 400),
        (FORM.replace(b'name="file"', b'name="files"') + END, "multipart/form-data; boundary=B", 400),
        (
            FORM.replace(b'name="purpose"\r\n\r\nbatch', b'name="expires_after[anchor]"\r\n\r\nnow') + END,
            "multipart/form-data; boundary=B",
            400,
        ),
        (
            FORM.replace(
                b"--B", b'--B\r\nContent-Disposition: form-data; name="expires_after[anchor]"\r\n\r\nnow\r\n--B', 1
            )
            + END,
            "multipart/form-data; boundary=B",
            400,
        ),
        (FORM * 2 + END, "multipart/form-data; boundary=B", 400),
        (FORM.replace(b'; name="purpose"', b"") + END, "multipart/form-data; boundary=B", 400),
        (FORM.replace(b'name="purpose"', b'name=""') + END, "multipart/form-data; boundary=B", 400),
        (FORM.replace(b'; name="file"', b"") + END, "multipart/form-data; boundary=B", 400),
        (FORM[: FORM.rindex(b"--B")] + FORM + b"{}" + END, "multipart/form-data; boundary=B", 400),
        (FORM * 50 + END, "multipart/form-data; boundary=B", 400),
        (FORM + END, "multipart/form-data; boundary=" + "B" * 5000, 400),
    ],
)
async def test_what_is_no_upload(server: Running, tmp_path: Path, body: bytes, content_type: str, status: int) -> None:
    """A body that is no upload is refused as what it is, and leaves nothing behind."""
    stream = await server.connect()
    await stream.send_all(
        http("POST", "/v1/files", body, f"Authorization: Bearer {KEYS[0]}", f"Content-Type: {content_type}")
    )
    assert (await read_response(stream))[0] == status
    assert stored(tmp_path) == []


async def test_too_large_by_its_head(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Content-Length beyond the limit is a 413 before the file is sent."""
    monkeypatch.setattr(edge, "_BODY_GRACE_S", 0.05)
    stream = await server.connect()
    await stream.send_all(head(50 * MIB))
    with trio.fail_after(30):
        status, headers, body = await read_response(stream)
    assert (status, headers["connection"]) == (413, "close")
    assert b"--max-file-bytes" in body
    assert stored(tmp_path) == []


async def test_too_large_in_chunks(server: Running, tmp_path: Path) -> None:
    """A chunked upload, which tells no length, is cut at the limit; nothing of it stays."""
    stream = await server.connect()
    lines = ["POST /v1/files HTTP/1.1", "Host: x", f"Authorization: Bearer {KEYS[0]}"]
    lines += ["Content-Type: multipart/form-data; boundary=B", "Transfer-Encoding: chunked", "", ""]
    await stream.send_all("\r\n".join(lines).encode())
    await stream.send_all(b"%x\r\n%b\r\n" % (len(FORM), FORM))
    for _ in range(6):
        await stream.send_all(b"%x\r\n%b\r\n" % (MIB, b"x" * MIB))
    await stream.send_all(b"%x\r\n%b\r\n0\r\n\r\n" % (len(END), END))
    with trio.fail_after(30):
        assert (await read_response(stream))[0] == 413
    assert stored(tmp_path) == []


async def test_exactly_the_limit_fits(server: Running) -> None:
    """A file of the limit's size is stored; one byte more is not."""
    for size, status in ((4 * MIB, 200), (4 * MIB + 1, 413)):
        stream = await server.connect()
        await stream.send_all(head(size) + b"x" * size + END)
        assert (await read_response(stream))[0] == status


async def test_without_a_key_nothing_is_stored(server: Running, tmp_path: Path) -> None:
    """An upload with a wrong key is a 401, however much of it was sent."""
    stream = await server.connect()
    await stream.send_all(head(1000, key="sk-wrong") + b"x" * 1000 + END)
    assert (await read_response(stream))[0] == 401
    assert stored(tmp_path) == []


async def test_a_client_that_leaves_leaves_nothing(
    server: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Hanging up in the middle of an upload removes what had arrived, and is nobody's failure."""
    stream = await server.connect()
    await stream.send_all(head(2 * MIB) + b"x" * MIB)
    while not stored(tmp_path):
        await trio.lowlevel.checkpoint()
    await stream.aclose()
    with trio.fail_after(30):
        while stored(tmp_path):
            await trio.lowlevel.checkpoint()
    assert (await use_client(server, lambda client: client.files.list().data, KEYS[0])) == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_file_that_is_deleted_while_it_is_read_is_read_to_its_end(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting takes a file from those who ask later; before its answer begins, it is a 404."""
    data = b"x" * (3 * MIB)
    find = files._find

    async def delete(disk: Disk, file_id: str) -> StoredFile:
        stored = await find(disk, file_id)
        await disk.run(disk.files.delete, file_id, stored.owner)
        return stored

    def upload(client: openai.OpenAI) -> str:
        return client.files.create(file=("a.jsonl", io.BytesIO(data)), purpose="batch").id

    def read(client: openai.OpenAI) -> bytes:
        with client.files.with_streaming_response.content(upload(client)) as answer:
            chunks = answer.iter_bytes(MIB)
            first = next(chunks)
            client.files.delete(str(answer.url).split("/")[-2])
            return b"".join([first, *chunks])

    def read_late(client: openai.OpenAI) -> None:
        file_id = upload(client)
        monkeypatch.setattr(files, "_find", delete)
        with pytest.raises(openai.NotFoundError):
            client.files.content(file_id)

    assert await use_client(server, read, KEYS[0]) == data
    await use_client(server, read_late, KEYS[0])


async def test_a_client_that_stops_sending_is_answered(tmp_path: Path) -> None:
    """An upload that stalls is a 408 after its time, and leaves nothing."""
    async with serving(tmp_path, body_timeout_s=0.05) as server:
        stream = await server.connect()
        await stream.send_all(head(2 * MIB) + b"x" * 1000)
        with trio.fail_after(30):
            assert (await read_response(stream))[0] == 408
        assert stored(tmp_path) == []


async def test_an_upload_that_drips_ends_with_its_request(tmp_path: Path) -> None:
    """Parts that keep coming do not keep an upload alive beyond --request-timeout: it is a 504, and nothing stays."""
    async with serving(tmp_path, request_timeout_s=0.1) as server:
        stream = await server.connect()
        await stream.send_all(head(2 * MIB))
        answered = trio.Event()

        async def drip() -> None:
            while not answered.is_set():
                await stream.send_all(b"x")
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            with trio.fail_after(3):  # Not the five seconds that others get to send the rest of a body.
                status, headers, body = await read_response(stream)
            answered.set()
        assert (status, headers["connection"]) == (504, "close")
        assert b"(--request-timeout)" in body
        assert stored(tmp_path) == []


def no_room(*_: Any) -> Any:
    """Fail as the kernel does on a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(*_: Any) -> Any:
    """Fail as the kernel does on a broken disk."""
    raise OSError(errno.EIO, "Input/output error")


def full_database(writer: FileWriter, *_: Any) -> None:
    """Fail as SQLite does on a full disk."""
    connection = writer._database.connection
    connection.execute("PRAGMA max_page_count = 1")
    connection.execute("CREATE TABLE more AS SELECT randomblob(1000000)")


@pytest.mark.parametrize(
    ("fail", "status", "code"),
    [(no_room, 507, "disk_full"), (full_database, 507, "disk_full"), (broken, 503, "storage_failed")],
)
@pytest.mark.parametrize("method", ["write", "sync"])
async def test_a_disk_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Any, status: int, code: str, method: str
) -> None:
    """A full disk is a 507 and a broken one a 503, never a 500; nothing stays of the file, and others are readable."""
    async with serving(tmp_path) as server:
        kept = await use_client(server, lambda client: client.files.create(file=b"{}", purpose="batch"), KEYS[0])
        monkeypatch.setattr(FileWriter, method, fail)
        stream = await server.connect()
        await stream.send_all(head(10) + b"x" * 10 + END)
        answer = await read_response(stream)
        assert (answer[0], json.loads(answer[2])["error"]["code"]) == (status, code)
        assert stored(tmp_path) == [kept.id]
        assert await use_client(server, lambda client: client.files.content(kept.id).read(), KEYS[0]) == b"{}"


async def test_uploads_are_never_held_whole(tmp_path: Path) -> None:
    """100 MB pass through to the disk, and back, in memory for a few pieces of them."""
    size = 100_000_000
    piece = b"0123456789" * 100_000
    async with serving(tmp_path) as server:
        stream = await server.connect()
        tracemalloc.start()
        try:
            await stream.send_all(head(size))
            for _ in range(size // len(piece)):
                await stream.send_all(piece)
            await stream.send_all(END)
            status, _, body = await read_response(stream)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert status == 200, body
    assert peak_bytes < 10_000_000
    (name,) = stored(tmp_path)
    assert (tmp_path / "files" / name).stat().st_size == size


async def test_a_data_directory_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a usable default directory everything else is served, and files and batches say why they are not."""
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    async with open_stub(StubRunner()) as engine, running(create_app(engine, Config())) as server:

        def use(client: openai.OpenAI) -> None:
            assert client.models.list().data
            with pytest.raises(openai.InternalServerError, match="data directory"):
                client.files.list()
            with pytest.raises(openai.InternalServerError, match="data directory"):
                client.files.create(file=b"x", purpose="batch")

        await use_client(server, use)
