"""The document is the contract: real requests of every route, and real answers, errors too, are what it says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import jsonschema
import pytest
import trio

from tests.server.helpers import Answer, ask, exchange, running
from tests.server.stub import open_stub
from trio_llm.config import Config, ServerConfig
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.openapi.document import OPERATIONS

JSON = {"content-type": "application/json"}
HI = [{"role": "user", "content": "hi"}]
CHAT = {"messages": HI, "max_tokens": 3}
COMPLETION = {"prompt": "abc", "max_tokens": 3}
MESSAGE = {"model": "stub", "max_tokens": 3, "messages": HI}
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": COMPLETION}


@attrs.define
class Contract:
    """A running app, its document, and which operations were tried with which outcome."""

    app: ServerApp
    document: dict[str, Any]
    seen: set[tuple[str, str, str]] = attrs.field(factory=set)

    def check(self, schema: dict[str, Any], value: Any) -> None:
        """Hold a value to a schema of the document."""
        whole = {**schema, "components": self.document["components"]}
        jsonschema.Draft202012Validator(whole).validate(value)

    async def ask(self, method: str, path: str, body: Any = None, *, rule: str = "", status: int = 200) -> Answer:
        """Ask, and hold the request, where it is to be accepted, and its answer to the document."""
        operation = self.document["paths"][rule or path][method.lower()]
        if body is not None and status < 400 and not isinstance(body, bytes):
            self.check(operation["requestBody"]["content"]["application/json"]["schema"], body)
        headers = {"content-type": "multipart/form-data; boundary=B"} if isinstance(body, bytes) else JSON
        answer = await ask(self.app, method, path, body, headers=headers)
        assert answer.status == status, answer.body
        responses = operation["responses"]
        content = responses.get(str(status), responses["default"])["content"]
        media = answer.headers["content-type"].split(";")[0]
        schema = content[media]["schema"]
        self.seen.add((method.lower(), rule or path, f"{media} {'refused' if status >= 400 else 'done'}"))
        if media == "application/json":
            self.check(schema, answer.json())
        elif media == "text/event-stream":
            for event in server_sent(answer.body):
                self.check(schema, event)
            for event in events_of(answer, has_names="event" in schema["properties"]):
                self.check(schema["properties"]["data"]["contentSchema"], event)
        return answer


def server_sent(body: bytes) -> list[dict[str, str]]:
    """Parse the fields of server-sent events, as tools that read the document do."""
    parts = body.decode().split("\n\n")[:-1]
    return [dict(line.split(": ", 1) for line in part.split("\n")) for part in parts]  # type: ignore[misc]


def events_of(answer: Answer, *, has_names: bool) -> list[Any]:
    """Parse a stream: one whose events bear their types as names, or one that ends with [DONE]."""
    if not has_names:
        *events, last = answer.events()
        assert last == "[DONE]"
        return events
    parts = [part.split("\ndata: ") for part in answer.body.decode().split("\n\n")[:-1]]
    events = [json.loads(data) for _, data in parts]
    assert [name for name, _ in parts] == [f"event: {event['type']}" for event in events]
    return events


@pytest.fixture
async def contract(tmp_path: Path) -> AsyncIterator[Contract]:
    """Serve with a data directory."""
    async with open_stub(max_batch_size=8, record=str(tmp_path / "records")) as engine:
        app = create_app(engine, Config(server=ServerConfig(data_dir=str(tmp_path / "data"))), shutdown=lambda: None)
        async with running(app):
            yield Contract(app, (await ask(app, "GET", "/openapi.json")).json())


async def generate(contract: Contract) -> None:
    """Ask for texts and vectors in every form there is."""
    asked = {"n": 2, "temperature": 1, "seed": 1}
    probabilities = {"logprobs": True, "top_logprobs": 2}
    for path, body in (
        ("/v1/chat/completions", {**CHAT, **asked, **probabilities, "return_token_ids": True, "echo": True}),
        ("/v1/completions", {**COMPLETION, **asked, "logprobs": 2, "echo": True, "return_token_ids": True}),
    ):
        await contract.ask("POST", path, body)
        await contract.ask("POST", path, {**body, "stream": True, "stream_options": {"include_usage": True}})
        await contract.ask("POST", f"{path}/render", body)
        await contract.ask("POST", f"{path}/render", {**body, "model": 7}, status=400)
        del body["return_token_ids"]
        await contract.ask("POST", path, {**body, "prompt_logprobs": 1})
        await contract.ask("POST", path, {**body, "max_tokens": -1}, status=400)
    for path, body in (
        ("/v1/messages", MESSAGE),
        ("/v1/responses", {"model": "stub", "input": "hi", "max_output_tokens": 3}),
    ):
        await contract.ask("POST", path, body)
        await contract.ask("POST", path, {**body, "stream": True})
        await contract.ask("POST", path, {**body, "model": 7}, status=400)
    await contract.ask("POST", "/v1/messages/count_tokens", {"model": "stub", "messages": HI})
    await contract.ask("POST", "/v1/messages/count_tokens", {}, status=400)
    for form in ("float", "base64"):
        await contract.ask("POST", "/v1/embeddings", {"input": ["a", "b"], "encoding_format": form})
    await contract.ask("POST", "/v1/embeddings", {"input": []}, status=400)


async def ask_about_requests(contract: Contract) -> None:
    """Explain and cancel a request that has ended, and one that never was."""
    body = {"prompt": "hi", "max_tokens": 2, "timings_per_token": True}
    await contract.ask("POST", "/v1/completions", {**body, "stream": True, "return_progress": True})
    answer_id = (await contract.ask("POST", "/v1/completions", body)).json()["id"]
    for method, what in (("GET", "explain"), ("POST", "cancel")):
        rule = "/v1/requests/{request_id}/" + what
        await contract.ask(method, f"/v1/requests/{answer_id}/{what}", rule=rule)
        await contract.ask(method, f"/v1/requests/none/{what}", rule=rule, status=404)


async def look_up(contract: Contract) -> None:
    """Ask what needs no model, and is no file."""
    for prefix in ("", "/v1"):
        await contract.ask("POST", f"{prefix}/tokenize", {"prompt": "abc", "return_token_strs": True})
        await contract.ask("POST", f"{prefix}/tokenize", {"messages": HI})
        await contract.ask("POST", f"{prefix}/tokenize", {}, status=400)
        await contract.ask("POST", f"{prefix}/detokenize", {"tokens": [5, 6]})
        await contract.ask("POST", f"{prefix}/detokenize", {"tokens": [-1]}, status=400)
    monitored = ("/health", "/ready", "/load", "/ping", "/version", "/metrics")
    for asset in ("start.js", "swagger-ui.css"):
        await contract.ask("GET", f"/docs/{asset}", rule="/docs/{asset}")
    await contract.ask("GET", "/docs/nothing", rule="/docs/{asset}", status=404)
    for asset in ("main.js", "page.css", "icon.svg"):
        await contract.ask("GET", f"/ui/{asset}", rule="/ui/{asset}")
    await contract.ask("GET", "/ui/nothing", rule="/ui/{asset}", status=404)
    await contract.ask("GET", "/")
    for path in (*monitored, "/tokenizer_info", "/v1/models", "/openapi.json", "/docs"):
        await contract.ask("GET", path)
    await contract.ask("POST", "/ping")
    await contract.ask("GET", "/v1/models/stub", rule="/v1/models/{model}")
    await contract.ask("GET", "/v1/models/other", rule="/v1/models/{model}", status=404)
    await watch(contract)
    await contract.ask("POST", "/v1/engine/record", {"recording": False})
    await contract.ask("POST", "/v1/engine/record", {"recording": 1}, status=400)
    for method in ("GET", "POST"):
        await contract.ask(method, "/shutdown", status=202)


async def watch(contract: Contract) -> None:
    """Hold a state of the engine, with a request that has ended, to the document: the stream has no end."""
    operation = contract.document["paths"]["/v1/engine/live"]["get"]
    call = exchange(contract.app, "GET", "/v1/engine/live")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.run)
        event = await call.chunks.receive()
        nursery.cancel_scope.cancel()
    schema = operation["responses"]["200"]["content"]["text/event-stream"]["schema"]
    (fields,) = server_sent(event)
    contract.check(schema, fields)
    contract.check(schema["properties"]["data"]["contentSchema"], json.loads(fields["data"]))
    contract.seen.add(("get", "/v1/engine/live", "text/event-stream done"))


async def files_and_batches(contract: Contract) -> None:
    """Upload, run, list, read and delete, well and badly."""
    head = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    head += b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    ids = [
        (await contract.ask("POST", "/v1/files", head + lines + b"\r\n--B--\r\n")).json()["id"]
        for lines in (json.dumps(LINE).encode(), b"{")
    ]
    await contract.ask("POST", "/v1/files", b"--B--\r\n", status=400)
    for file_id in ids:
        body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch_id = (await contract.ask("POST", "/v1/batches", {**body, "metadata": {"a": "b"}})).json()["id"]
        rule = "/v1/batches/{batch_id}"
        with trio.fail_after(30):
            while (batch := (await contract.ask("GET", f"/v1/batches/{batch_id}", rule=rule)).json())["status"] not in (
                "completed",
                "failed",
            ):
                await trio.lowlevel.checkpoint()
        status = 200 if batch["status"] == "completed" else 409
        await contract.ask("GET", f"/v1/batches/{batch_id}/results", rule=f"{rule}/results", status=status)
        await contract.ask("POST", f"/v1/batches/{batch_id}/cancel", rule=f"{rule}/cancel")
    await contract.ask("POST", "/v1/batches", {"endpoint": "completions", "prompts": ["a"], "max_tokens": 2})
    await contract.ask("POST", "/v1/batches", {"endpoint": "images"}, status=400)
    for what in ("", "/cancel", "/results"):
        method = "POST" if what == "/cancel" else "GET"
        await contract.ask(method, f"/v1/batches/none{what}", rule="/v1/batches/{batch_id}" + what, status=404)
    for method, what in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        rule = "/v1/files/{file_id}" + what
        await contract.ask(method, f"/v1/files/{ids[0]}{what}", rule=rule)
        await contract.ask(method, f"/v1/files/none{what}", rule=rule, status=404)
    for path in ("/v1/files", "/v1/batches"):
        assert (await contract.ask("GET", path)).json()["data"]
        await ask(contract.app, "GET", f"{path}?limit=0")
        contract.check(
            {"$ref": "#/components/schemas/Error"}, (await ask(contract.app, "GET", f"{path}?limit=0")).json()
        )


async def test_every_route_answers_as_the_document_says(contract: Contract) -> None:
    """Each operation is asked and answers by its schema in each of its media, and refuses by the error's schema."""
    await generate(contract)
    await ask_about_requests(contract)
    await files_and_batches(contract)
    await look_up(contract)
    promised = {(o.method, o.path, f"{media} done") for o in OPERATIONS for media in o.media}
    assert {seen for seen in contract.seen if seen[2].endswith("done")} == promised
    refusable = {(o.method, o.path) for o in OPERATIONS if o.body is not None or "{" in o.path}
    assert refusable <= {seen[:2] for seen in contract.seen if seen[2].endswith("refused")}


async def test_an_answer_that_says_more_is_noticed(contract: Contract) -> None:
    """The schemas are closed: a field that is not in the document, or of another type, fails the walk above."""
    answer = (await ask(contract.app, "POST", "/v1/chat/completions", CHAT, headers=JSON)).json()
    schema = {"$ref": "#/components/schemas/ChatCompletion"}
    contract.check(schema, answer)
    for wrong in ({**answer, "more": 1}, {**answer, "created": "now"}, {k: v for k, v in answer.items() if k != "id"}):
        with pytest.raises(jsonschema.ValidationError):
            contract.check(schema, wrong)
