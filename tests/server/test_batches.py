"""/v1/batches over a real socket: from an uploaded file, or inline, to results that each key sees alone."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.server.client import use_client
from tests.server.helpers import Running, ask, exchange, running
from tests.server.stub import GatedWorker, StubRunner, continuation, open_stub
from trio_llm.config import AuthConfig, Config, EngineConfig, ServerConfig
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.batches.batch_store import BatchStore
from trio_llm.server.batches.disk import Disk
from trio_llm.server.batches.file_store import FileStore, FileWriter

KEYS = ("sk-0123456789abcdef", "sk-fedcba9876543210")
JSON = {"content-type": "application/json"}
ENDED = ("completed", "failed", "expired", "cancelled")


@asynccontextmanager
async def serving(directory: Path, **options: Any) -> AsyncIterator[Running]:
    """Serve with a data directory, and close it in order."""
    auth = AuthConfig(api_keys=KEYS, rate_limit_requests=0)
    size = {name: value for name, value in options.items() if name == "max_batch_size"}
    config = Config(server=ServerConfig(data_dir=str(directory)), auth=auth, engine=EngineConfig(**size))
    async with open_stub(StubRunner(), **options) as engine, running(create_app(engine, config)) as server:
        yield server
        server.stop.set()
        with trio.fail_after(30):
            await server.stopped.wait()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    """Serve."""
    async with serving(tmp_path) as server:
        yield server


def jsonl(url: str, *bodies: dict[str, Any]) -> bytes:
    """Return an input file."""
    lines = [
        {"custom_id": f"c{number}", "method": "POST", "url": url, "body": body} for number, body in enumerate(bodies)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def run_batch(client: openai.OpenAI, data: bytes, url: Any, **options: Any) -> Any:
    """Upload, submit, and wait for the end."""
    file = client.files.create(file=data, purpose="batch")
    return wait(client, client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h", **options))


def wait(client: openai.OpenAI, batch: Any) -> Any:
    """Wait for a batch to end."""
    deadline = time.monotonic() + 60
    while batch.status not in ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def read_lines(client: openai.OpenAI, file_id: str | None) -> list[Any]:
    """Read a result file."""
    return [] if file_id is None else [json.loads(line) for line in client.files.content(file_id).read().splitlines()]


async def test_two_hundred_lines(server: Running) -> None:
    """Every line of a batch is answered as a request of its own would be, once, in order; bad ones go to errors."""
    bodies: list[dict[str, Any]] = [{"prompt": f"number {number}", "max_tokens": 3} for number in range(200)]
    bodies[7] = {"prompt": "x", "max_tokens": -1}
    bodies[8] = {"prompt": "x", "model": "gpt-4"}

    def use(client: openai.OpenAI) -> tuple[Any, ...]:
        batch = run_batch(client, jsonl("/v1/completions", *bodies), "/v1/completions", metadata={"who": "me"})
        return batch, read_lines(client, batch.output_file_id), read_lines(client, batch.error_file_id)

    batch, output, errors = await use_client(server, use, KEYS[0])
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (200, 198, 2)
    assert batch.metadata == {"who": "me"}
    assert [line["custom_id"] for line in output] == [f"c{n}" for n in range(200) if n not in {7, 8}]
    for line in output:
        assert line["response"]["status_code"] == 200
        number = line["custom_id"][1:]
        assert line["response"]["body"]["choices"][0]["text"] == continuation(f"number {number}", 3)
    assert [(line["custom_id"], line["response"]["status_code"]) for line in errors] == [("c7", 400), ("c8", 404)]
    assert errors[0]["response"]["body"]["error"]["param"] == "max_tokens"
    assert batch.usage.output_tokens == 198 * 3


HALF = "\\ud800"
HOSTILE = [
    ("completions", f'{{"model": "{HALF}", "prompt": "x"}}'),
    ("completions", f'{{"prompt": "x", "stop": ["{HALF}"]}}'),
    ("completions", f'{{"prompt": "x", "{HALF}": 1}}'),
    ("completions", f'{{"prompt": "x", "{HALF}": 1, "{HALF}": 2}}'),
    ("completions", f'{{"prompt": "x", "user": "{HALF}"}}'),
    ("completions", '{"prompt": "x", "prompt": "y"}'),
    ("completions", '{"prompt": "x", "temperature": NaN}'),
    ("completions", '{"prompt": "x", "temperature": -Infinity}'),
    ("completions", '{"prompt": "x", "temperature": 1e999}'),
    ("completions", '{"prompt": "x", "seed": ' + "9" * 21 + "}"),
    ("completions", '{"prompt": "x", "seed": ' + "9" * 5000 + "}"),
    ("completions", '{"prompt": ' + "[" * 33 + "]" * 33 + "}"),
    ("completions", '{"prompt": ' + "[" * 500 + "]" * 500 + "}"),
    ("completions", '{"prompt": [' + "[]," * 20_000 + "[]]}"),
    ("completions", '{"prompt": "x", "suffix": "y"}'),
    ("completions", '{"prompt": null}'),
    ("completions", "{}"),
    ("completions", '{"prompt": "x", "metadata": {"k": "' + "v" * 513 + '"}}'),
    ("chat/completions", f'{{"messages": [{{"role": "user", "content": "{HALF}"}}]}}'),
    (
        "chat/completions",
        '{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "f"}}],'
        f' "tool_choice": {{"type": "function", "function": {{"name": "{HALF}"}}}}}}',
    ),
    ("embeddings", f'{{"input": "{HALF}"}}'),
    ("embeddings", '{"input": "x", "dimensions": 1e999}'),
]


async def test_a_hostile_line_fails_alone_and_as_a_request_would(tmp_path: Path) -> None:
    """Lines are parsed as strictly as requests: each bad one gets the error that HTTP answers, and harms no other."""
    config = Config(server=ServerConfig(data_dir=str(tmp_path)))
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, config)
        async with running(app):
            for endpoint in ("completions", "chat/completions", "embeddings"):
                bodies = [body for name, body in HOSTILE if name == endpoint]
                good = {"prompt": "x", "max_tokens": 1, "input": "x", "messages": [{"role": "user", "content": "x"}]}
                bodies.append(json.dumps(good))
                lines = [
                    f'{{"custom_id": "c{i}", "method": "POST", "url": "/v1/{endpoint}", "body": {body}}}\n'
                    for i, body in enumerate(bodies)
                ]
                output, errors = await answered_lines(app, f"/v1/{endpoint}", "".join(lines).encode())
                assert [line["custom_id"] for line in output] == [f"c{len(bodies) - 1}"]
                assert [line["custom_id"] for line in errors] == [f"c{i}" for i in range(len(bodies) - 1)]
                for line, body in zip(errors, bodies, strict=False):
                    answer = await ask(app, "POST", f"/v1/{endpoint}", body.encode())
                    assert (answer.status, answer.json()) == (400, line["response"]["body"])
            assert (await ask(app, "GET", "/health")).json() == {"status": "ok"}


async def answered_lines(app: Any, url: str, data: bytes) -> tuple[list[Any], list[Any]]:
    """Run an input file as a batch; return the lines of the output and of the error file."""
    wanted = {"input_file_id": await upload(app, data), "endpoint": url, "completion_window": "24h"}
    made = (await ask(app, "POST", "/v1/batches", wanted)).json()
    with trio.fail_after(60):
        batch = await poll(app, made["id"], lambda batch: batch["status"] in ENDED)
    assert batch["status"] == "completed", batch
    contents: list[list[Any]] = []
    for name in ("output_file_id", "error_file_id"):
        text = (await ask(app, "GET", f"/v1/files/{batch[name]}/content")).body
        contents.append([json.loads(line) for line in text.splitlines()])
    return contents[0], contents[1]


async def test_chat_and_embeddings(server: Running) -> None:
    """Lines may ask for chats and embeddings too."""
    hi = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

    def use(client: openai.OpenAI) -> tuple[Any, Any]:
        chats = run_batch(client, jsonl("/v1/chat/completions", hi, hi), "/v1/chat/completions")
        vectors = run_batch(client, jsonl("/v1/embeddings", {"input": "cat"}), "/v1/embeddings")
        return read_lines(client, chats.output_file_id), read_lines(client, vectors.output_file_id)

    chats, vectors = await use_client(server, use, KEYS[0])
    assert [line["response"]["body"]["object"] for line in chats] == ["chat.completion"] * 2
    assert len(vectors[0]["response"]["body"]["data"][0]["embedding"]) == 4


async def test_the_inline_form(server: Running) -> None:
    """A list of prompts with what they have in common is a batch too; /results holds output and errors."""

    def use(client: openai.OpenAI) -> tuple[Any, bytes]:
        body = {"prompts": ["one", "two", "x" * 600], "endpoint": "completions", "max_tokens": 4, "temperature": 0}
        made = client.post("/batches", body=body, cast_to=dict[str, Any])
        batch = wait(client, client.batches.retrieve(made["id"]))
        with urllib.request.urlopen(
            urllib.request.Request(
                f"http://127.0.0.1:{server.port}/v1/batches/{batch.id}/results",
                headers={"Authorization": f"Bearer {KEYS[0]}"},
            )
        ) as response:
            return batch, response.read()

    batch, results = await use_client(server, use, KEYS[0])
    assert (batch.status, batch.endpoint) == ("completed", "/v1/completions")
    lines = [json.loads(line) for line in results.splitlines()]
    texts = [line["response"]["body"]["choices"][0]["text"] for line in lines[:2]]
    assert texts == [continuation("one", 4), continuation("two", 4)]
    assert (lines[2]["custom_id"], lines[2]["response"]["status_code"]) == ("prompt-2", 400)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "endpoint"),
        ({"endpoint": "/v1/completions"}, "input_file_id"),
        ({"endpoint": "/v1/images", "input_file_id": "file-1", "completion_window": "24h"}, "endpoint"),
        ({"endpoint": "/v1/completions", "input_file_id": "file-1"}, "completion_window"),
        ({"endpoint": "/v1/completions", "input_file_id": "file-1", "completion_window": "1h"}, "completion_window"),
        ({"endpoint": "/v1/completions", "input_file_id": "../x", "completion_window": "24h"}, "input_file_id"),
        ({"endpoint": "completions", "prompts": []}, "prompts"),
        ({"endpoint": "completions", "prompts": ["a"], "input_file_id": "file-1"}, "prompts"),
        ({"endpoint": "chat/completions", "prompts": [[1]]}, "prompts"),
        ({"endpoint": "completions", "input_file_id": "file-1", "max_tokens": 1}, "max_tokens"),
        ({"endpoint": "completions", "prompts": ["a"], "metadata": {"k": "x" * 513}}, "metadata"),
        ({"endpoint": "completions", "prompts": ["a"], "output_expires_after": {"anchor": "created_at", "seconds": 1}},
         "output_expires_after.seconds"),
        ({"endpoint": "embeddings", "prompts": ["a"], "max_tokens": 5}, "max_tokens"),
        ({"endpoint": "embeddings", "prompts": ["a"], "temperature": 1}, "temperature"),
        ({"endpoint": "embeddings", "prompts": ["a"], "top_p": 1}, "top_p"),
        ({"endpoint": "embeddings", "prompts": ["a"], "seed": 0}, "seed"),
        ({"endpoint": "embeddings", "prompts": ["a"], "stop": ["x"]}, "stop"),
    ],
)  # fmt: skip
async def test_refusals(server: Running, body: dict[str, Any], param: str) -> None:
    """A batch that cannot be is a 400 naming the field."""

    def use(client: openai.OpenAI) -> Any:
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/batches", body=body, cast_to=dict[str, Any])
        return caught.value

    error = await use_client(server, use, KEYS[0])
    assert error.param is not None
    assert error.param.startswith(param)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[ServerApp]:
    """Return an app with a data directory, which is asked in process."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config(server=ServerConfig(data_dir=str(tmp_path))))
        async with running(app):
            yield app


async def upload(app: ServerApp, data: bytes) -> str:
    """Upload an input file; return its id."""
    form = [b'name="purpose"\r\n\r\nbatch', b'name="file"; filename="a"\r\n\r\n' + data]
    body = b"".join(b"--B\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in form) + b"--B--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=B"}
    return (await ask(app, "POST", "/v1/files", body, headers=headers)).json()["id"]


def between_calls(monkeypatch: pytest.MonkeyPatch, work: Callable[[Disk], None]) -> None:
    """Do `work` after each storage call, as another client's request may."""
    real = Disk.run

    async def run(self: Disk, call: Callable[..., Any], *args: Any) -> Any:
        result = await real(self, call, *args)
        await real(self, work, self)
        return result

    monkeypatch.setattr(Disk, "run", run)


async def test_no_file_is_deleted_as_its_batch_is_made(app: ServerApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is accepted has its file, whenever somebody wants to delete it."""
    file_id = await upload(app, jsonl("/v1/completions", {"prompt": "a", "max_tokens": 1}))
    in_use: list[bool] = []

    def delete(disk: Disk) -> None:
        in_use.append(disk.files.in_use(file_id))
        if not any(in_use):
            disk.files.delete(file_id)

    wanted = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    with monkeypatch.context() as patched:
        between_calls(patched, delete)
        made = await ask(app, "POST", "/v1/batches", wanted)
    assert (made.status, in_use[0]) == (200, True)
    assert (await ask(app, "GET", f"/v1/files/{file_id}")).status == 200


async def test_no_batch_is_made_as_its_file_is_deleted(app: ServerApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is deleted has no batch, whenever somebody wants one of it."""
    file_id = await upload(app, jsonl("/v1/completions", {"prompt": "a"}))
    made: list[str] = []

    def create(disk: Disk) -> None:
        if not made and disk.files.get(file_id) is not None:
            batch = disk.batches.create(
                input_file_id=file_id, endpoint="", completion_window="24h", window_s=1, metadata={}
            )
            made.append(batch["id"])

    with monkeypatch.context() as patched:
        between_calls(patched, create)
        assert (await ask(app, "DELETE", f"/v1/files/{file_id}")).json()["deleted"]
    assert made == []
    assert (await ask(app, "DELETE", f"/v1/files/{file_id}")).status == 404


async def test_a_client_that_leaves_as_its_prompts_are_written(app: ServerApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that are stored have their batch: else nobody would delete them."""
    body = json.dumps({"endpoint": "completions", "prompts": ["a"], "max_tokens": 1}).encode()
    call = exchange(app, "POST", "/v1/batches", body)
    real, token = FileStore.create, trio.lowlevel.current_trio_token()

    async def leave() -> None:
        call.disconnect()
        await wait_all_tasks_blocked()

    def create(self: FileStore, filename: str, *args: Any, **options: Any) -> FileWriter:
        if filename == "prompts.jsonl":
            trio.from_thread.run(leave, trio_token=token)  # Not of the request, which is cancelled meanwhile.
        return real(self, filename, *args, **options)

    monkeypatch.setattr(FileStore, "create", create)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.run)
            await call.body()
    files = (await ask(app, "GET", "/v1/files?purpose=batch")).json()["data"]
    batches = (await ask(app, "GET", "/v1/batches")).json()["data"]
    assert [file["id"] for file in files] == [batch["input_file_id"] for batch in batches] != []


async def test_prompts_whose_batch_cannot_be_made(
    app: ServerApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the disk has no room for the batch, its prompts do not stay either."""

    def create(self: BatchStore, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BatchStore, "create", create)
    body = {"endpoint": "completions", "prompts": ["a"]}
    assert (await ask(app, "POST", "/v1/batches", body)).status == 507
    assert (await ask(app, "GET", "/v1/files")).json()["data"] == []
    assert list((tmp_path / "files").iterdir()) == []


async def test_results_of_a_batch_that_failed_late(app: ServerApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that ends as failed gives the answers it has; one that had no lines to answer has no results."""
    finish = BatchStore.finish

    def fail(self: BatchStore, batch_id: str, status: str, *args: Any) -> None:
        finish(self, batch_id, "failed", *args)

    monkeypatch.setattr(BatchStore, "finish", fail)
    for data, status in ((jsonl("/v1/completions", {"prompt": "a", "max_tokens": 1}), 200), (b"{\n", 409)):
        wanted = {"input_file_id": await upload(app, data), "endpoint": "/v1/completions", "completion_window": "24h"}
        batch_id = (await ask(app, "POST", "/v1/batches", wanted)).json()["id"]
        with trio.fail_after(60):
            assert (await poll(app, batch_id, lambda batch: batch["status"] in ENDED))["status"] == "failed"
        answer = await ask(app, "GET", f"/v1/batches/{batch_id}/results")
        assert answer.status == status
        if status == 200:
            assert answer.json()["response"]["body"]["choices"][0]["text"] == continuation("a", 1)


async def test_a_file_that_is_no_batch_fails(server: Running) -> None:
    """An input file with a bad line fails its batch, which names the line."""

    def use(client: openai.OpenAI) -> Any:
        return run_batch(client, jsonl("/v1/completions", {"prompt": "a"}) + b"{\n", "/v1/completions")

    batch = await use_client(server, use, KEYS[0])
    assert (batch.status, batch.errors.data[0].line) == ("failed", 2)


async def test_keys_see_their_own_batches(server: Running) -> None:
    """A batch of one key does not exist for another, nor do its results."""

    def make(client: openai.OpenAI) -> Any:
        return run_batch(client, jsonl("/v1/completions", {"prompt": "a"}), "/v1/completions")

    batch = await use_client(server, make, KEYS[0])

    def use(client: openai.OpenAI) -> None:
        assert client.batches.list().data == []
        for method in (client.batches.retrieve, client.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                method(batch.id)
        with pytest.raises(openai.NotFoundError):
            client.get(f"/batches/{batch.id}/results", cast_to=str)
        with pytest.raises(openai.NotFoundError):
            client.files.content(batch.output_file_id)

    await use_client(server, use, KEYS[1])
    assert [b.id for b in await use_client(server, lambda client: list(client.batches.list()), KEYS[0])] == [batch.id]


async def test_cancelling(tmp_path: Path) -> None:
    """A running batch is cancelled: its lines leave the engine, and each is accounted for in the error file."""
    worker = GatedWorker()
    async with serving(tmp_path, worker=worker) as server:

        def use(client: openai.OpenAI) -> tuple[Any, list[Any]]:
            data = jsonl("/v1/completions", *[{"prompt": str(number)} for number in range(20)])
            file = client.files.create(file=data, purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            with pytest.raises(openai.ConflictError):
                client.files.delete(file.id)
            with pytest.raises(openai.ConflictError):
                client.get(f"/batches/{batch.id}/results", cast_to=str)
            assert client.batches.cancel(batch.id).status in {"cancelling", "cancelled"}
            batch = wait(client, batch)
            return batch, read_lines(client, batch.error_file_id)

        batch, errors = await use_client(server, use, KEYS[0])
        worker.open = True
        worker.let(1000)
    assert batch.status == "cancelled"
    assert {line["error"]["code"] for line in errors} <= {"batch_cancelled"}
    assert len(errors) in {0, 20}  # none, if it was cancelled before its lines were read


async def test_cancelling_in_the_middle(tmp_path: Path) -> None:
    """What was answered before a batch is cancelled stands in its output file; every state tells the right counts."""
    worker = GatedWorker()
    states: list[tuple[str, int, int, int]] = []

    def note(batch: Any) -> Any:
        counts = batch.request_counts
        states.append((batch.status, counts.total, counts.completed, counts.failed))
        return batch

    async with serving(tmp_path, worker=worker, max_batch_size=4) as server:

        def begin(client: openai.OpenAI) -> str:
            bodies: list[dict[str, Any]] = [{"prompt": f"n{number}", "max_tokens": 2} for number in range(10)]
            bodies[1] = {"prompt": "x", "max_tokens": -1}
            file = client.files.create(file=jsonl("/v1/completions", *bodies), purpose="batch")
            return note(
                client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            ).id

        def end(client: openai.OpenAI) -> tuple[Any, list[Any], list[Any]]:
            deadline = time.monotonic() + 60
            while note(client.batches.retrieve(batch_id)).request_counts.completed < 3:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            note(client.batches.cancel(batch_id))
            batch = note(wait(client, client.batches.retrieve(batch_id)))
            return batch, read_lines(client, batch.output_file_id), read_lines(client, batch.error_file_id)

        batch_id = await use_client(server, begin, KEYS[0])
        worker.let(6)  # Two lines run at once: so many steps are two pairs of lines, or three.
        batch, output, errors = await use_client(server, end, KEYS[0])
        worker.open = True
        worker.let(1)
    assert states[0] == ("validating", 0, 0, 0)
    assert {status for status, *_ in states} <= {"validating", "in_progress", "cancelling", "cancelled"}
    assert all(completed + failed <= total for _, total, completed, failed in states)
    completed = [state[2] for state in states]
    assert completed == sorted(completed)
    assert states[-1] == ("cancelled", 10, len(output), 10 - len(output)) and 3 <= len(output) < 9
    assert batch.cancelling_at is not None and batch.cancelled_at is not None
    for line in output:
        number = line["custom_id"][1:]
        assert line["response"]["body"]["choices"][0]["text"] == continuation(f"n{number}", 2)
    told = {line["custom_id"]: line for line in errors}
    assert told.keys() | {line["custom_id"] for line in output} == {f"c{number}" for number in range(10)}
    assert told["c1"]["response"]["status_code"] == 400
    assert {line["error"]["code"] for line in errors if line["response"] is None} == {"batch_cancelled"}


async def test_expiry(tmp_path: Path, mock_clock: MockClock) -> None:
    """After its window a batch that still waits ends as expired, with the lines it has and a reason for the others."""
    worker = GatedWorker()
    config = Config(server=ServerConfig(data_dir=str(tmp_path)), engine=EngineConfig(max_batch_size=2))
    body = {"prompts": ["a", "b", "c"], "endpoint": "completions", "max_tokens": 2}
    async with open_stub(StubRunner(), worker=worker, max_batch_size=2) as engine:
        app = create_app(engine, config)
        async with running(app):
            made = (await ask(app, "POST", "/v1/batches", body, headers=JSON)).json()
            worker.let(3)  # One line runs at a time, of two tokens each.
            batch = await poll(app, made["id"], lambda batch: batch["request_counts"]["completed"] == 1)
            assert batch["status"] == "in_progress"
            mock_clock.jump(86_400)
            batch = await poll(app, made["id"], lambda batch: batch["status"] in ENDED)
            worker.open = True
            worker.let(1)
            results = (await ask(app, "GET", f"/v1/batches/{made['id']}/results")).body
    assert batch["status"] == "expired" and batch["expired_at"] is not None
    assert batch["expires_at"] == batch["created_at"] + 86_400
    assert batch["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
    lines = [json.loads(line) for line in results.splitlines()]
    assert lines[0]["response"]["body"]["choices"][0]["text"] == continuation("a", 2)
    assert [line["error"]["code"] for line in lines[1:]] == ["batch_expired"] * 2


async def poll(app: Any, batch_id: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Ask for a batch until it is as wanted."""
    while not done(batch := (await ask(app, "GET", f"/v1/batches/{batch_id}")).json()):
        await trio.lowlevel.checkpoint()
    return batch


async def test_lines_are_charged_to_their_key(tmp_path: Path, mock_clock: MockClock) -> None:
    """What a batch has spent is gone from its key's bucket for requests too, and its lines wait for the refill."""
    auth = AuthConfig(api_keys=KEYS, rate_limit_requests=0, rate_limit_tokens=6, rate_limit_window_secs=6)
    config = Config(server=ServerConfig(data_dir=str(tmp_path)), auth=auth, engine=EngineConfig(max_batch_size=2))
    body = {"prompts": ["a", "b", "c"], "endpoint": "completions", "max_tokens": 5}
    async with open_stub(StubRunner(), max_batch_size=2) as engine:
        app = create_app(engine, config)
        mine, others = ({**JSON, "x-api-key": key} for key in KEYS)
        async with running(app):
            made = (await ask(app, "POST", "/v1/batches", body, headers=mine)).json()

            def count() -> int:
                uri = f"file:{tmp_path}/trio-llm.sqlite3?mode=ro"
                with closing(sqlite3.connect(uri, uri=True)) as connection:
                    return connection.execute("SELECT completed FROM batches WHERE id = ?", (made["id"],)).fetchone()[0]

            for completed in (1, 2, 3):
                while count() < completed:
                    await trio.lowlevel.checkpoint()
                answer = await ask(app, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, headers=mine)
                assert answer.status == 429
                answer = await ask(app, "GET", "/v1/models", headers=others)
                assert answer.headers["x-ratelimit-remaining-tokens"] == "6"
                assert count() == completed
                mock_clock.jump(1.5)
                await trio.testing.wait_all_tasks_blocked()
                mock_clock.jump(4.5)


async def test_a_batch_survives_a_restart(tmp_path: Path) -> None:
    """A server that stops in good order leaves lines pending; the next one answers them."""
    worker = GatedWorker()
    async with serving(tmp_path, worker=worker) as server:

        def begin(client: openai.OpenAI) -> str:
            data = jsonl("/v1/completions", *[{"prompt": str(number), "max_tokens": 2} for number in range(10)])
            file = client.files.create(file=data, purpose="batch")
            return client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h").id

        batch_id = await use_client(server, begin, KEYS[0])
    async with serving(tmp_path) as server:

        def end(client: openai.OpenAI) -> tuple[Any, list[Any]]:
            batch = wait(client, client.batches.retrieve(batch_id))
            return batch, read_lines(client, batch.output_file_id)

        batch, output = await use_client(server, end, KEYS[0])
    assert batch.status == "completed"
    assert [line["response"]["body"]["choices"][0]["text"] for line in output] == [
        continuation(str(number), 2) for number in range(10)
    ]


# --- killed at any instant ------------------------------------------------------------------------------------------

LINES = 60


@contextmanager
def process(directory: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a real `trio-llm serve` with the demo model; yields it and its URL, and kills it."""
    command = [
        sys.executable,
        "-m",
        "trio_llm",
        "serve",
        "--port",
        "0",
        "--host",
        "127.0.0.1",
        "--log-level",
        "warning",
    ]
    command += ["--data-dir", str(directory), "--max-batch-size", "8"]
    # In bfloat16, how lines happen to share a step rounds logits differently, and now and then a sample with them.
    command += ["--dtype", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            said = ""
            while (found := re.search(r"served on (http://127\.0\.0\.1:\d+)", said)) is None:
                line = server.stdout.readline()
                assert line, said
                said += line
            yield server, found[1]
        finally:
            server.kill()


def call(url: str, body: Any = None) -> Any:
    """Ask a server, with JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read()


def answered(directory: Path) -> int:
    """Count the lines that a batch has answered so far, as its disk tells."""
    with closing(sqlite3.connect(f"file:{directory}/trio-llm.sqlite3?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT coalesce(sum(completed + failed), 0) FROM batches").fetchone()[0]


def submit(url: str) -> str:
    """Submit a batch of seeded samples."""
    prompts = [f"Once upon a time {number}" for number in range(LINES)]
    body = {"prompts": prompts, "endpoint": "completions", "max_tokens": 12, "temperature": 1, "seed": 5}
    return json.loads(call(f"{url}/v1/batches", body))["id"]


def results(url: str, batch_id: str) -> list[Any]:
    """Wait for a batch and return its lines."""
    deadline = time.monotonic() + 120
    while (batch := json.loads(call(f"{url}/v1/batches/{batch_id}")))["status"] not in ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    assert batch["status"] == "completed", batch
    assert batch["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
    return [json.loads(line) for line in call(f"{url}/v1/batches/{batch_id}/results").splitlines()]


def killed(directory: Path, points: list[int]) -> list[Any]:
    """Run a batch on servers that are killed once so many lines are answered; return its lines."""
    with process(directory) as (server, url):
        batch_id = submit(url)
        while answered(directory) < points[0]:
            time.sleep(0.002)
        server.send_signal(signal.SIGKILL)
        server.wait()
    for point in points[1:]:
        with process(directory) as (server, _):
            while answered(directory) < point:
                time.sleep(0.002)
            server.send_signal(signal.SIGKILL)
            server.wait()
    with process(directory) as (_, url):
        return results(url, batch_id)


def check_killed(tmp_path: Path, points: list[int]) -> None:
    """Compare a batch whose servers were killed with one that ran through."""
    with process(tmp_path / "whole") as (_, url):
        whole = results(url, submit(url))
    lines = killed(tmp_path / "killed", points)
    assert [line["custom_id"] for line in lines] == [f"prompt-{number}" for number in range(LINES)]
    assert [line["response"]["body"]["choices"][0]["text"] for line in lines] == [
        line["response"]["body"]["choices"][0]["text"] for line in whole
    ]
    assert (tmp_path / "killed" / "trio-llm.sqlite3").exists()


@pytest.mark.slow
def test_killed_once(tmp_path: Path) -> None:
    """SIGKILL in the middle of a batch: after a restart no line is lost, doubled or changed."""
    check_killed(tmp_path, [LINES // 3])


@pytest.mark.slow
def test_killed_at_random_instants() -> None:
    """The script that kills servers whenever it likes, while they start too, finds every line once and unchanged."""
    script = Path(__file__).parents[2] / "benchmarks" / "batch.py"
    command = [sys.executable, str(script), "--lines", "600", "--mib", "1", "--kills", "4", "--seed", "1"]
    done = subprocess.run([*command, "--max-batch-size", "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("600 lines: 0 lost, 0 doubled, 0 changed, in order: True") == 2


@pytest.mark.slow
def test_killed_at_many_points(tmp_path: Path) -> None:
    """SIGKILL before the first answer, after it, again and again, and at the end: no line lost, doubled or changed."""
    check_killed(tmp_path, [0, 1, 31, LINES])


@pytest.mark.slow
def test_told_to_end_in_the_middle(tmp_path: Path) -> None:
    """Servers that are told to end, once or twice, or are killed while they drain, lose, double and fail no line."""
    with process(tmp_path) as (server, url):
        batch_id = submit(url)
        wait_for(tmp_path, 1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    before = answered(tmp_path)
    with process(tmp_path) as (server, url):
        wait_for(tmp_path, before + 1)
        for _ in range(2):
            server.send_signal(signal.SIGINT)
        server.wait(30)
    before = answered(tmp_path)
    with process(tmp_path) as (server, url):
        wait_for(tmp_path, before + 1)
        call(f"{url}/shutdown")
        server.send_signal(signal.SIGKILL)
        server.wait()
    with process(tmp_path) as (_, url):
        lines = results(url, batch_id)
    assert [line["custom_id"] for line in lines] == [f"prompt-{number}" for number in range(LINES)]


def wait_for(directory: Path, lines: int) -> None:
    """Wait until so many lines are answered."""
    while answered(directory) < min(lines, LINES):
        time.sleep(0.002)
