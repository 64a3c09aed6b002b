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

from tests.server.helpers import Answer, ask, running
from tests.server.stub import open_stub
from trio_llm.config import Config, ServerConfig
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.openapi import OPERATIONS

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
        elif "contentSchema" in schema:
            *events, last = answer.events()
            assert last == "[DONE]"
            for event in events:
                self.check(schema["contentSchema"], event)
        return answer


@pytest.fixture
async def contract(tmp_path: Path) -> AsyncIterator[Contract]:
    """Serve with a data directory."""
    async with open_stub(max_batch_size=8) as engine:
        app = create_app(engine, Config(server=ServerConfig(data_dir=str(tmp_path))), shutdown=lambda: None)
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
        del body["return_token_ids"]
        await contract.ask("POST", path, {**body, "prompt_logprobs": 1})
        await contract.ask("POST", path, {**body, "max_tokens": -1}, status=400)
    for path, body in (("/v1/messages", MESSAGE), ("/v1/responses", {"input": "hi", "max_output_tokens": 3})):
        await contract.ask("POST", path, body)
        await contract.ask("POST", path, {**body, "stream": True})
        await contract.ask("POST", path, {**body, "model": 7}, status=400)
    await contract.ask("POST", "/v1/messages/count_tokens", {"model": "stub", "messages": HI})
    await contract.ask("POST", "/v1/messages/count_tokens", {}, status=400)
    for form in ("float", "base64"):
        await contract.ask("POST", "/v1/embeddings", {"input": ["a", "b"], "encoding_format": form})
    await contract.ask("POST", "/v1/embeddings", {"input": []}, status=400)


async def look_up(contract: Contract) -> None:
    """Ask what needs no model, and is no file."""
    for prefix in ("", "/v1"):
        await contract.ask("POST", f"{prefix}/tokenize", {"prompt": "abc", "return_token_strs": True})
        await contract.ask("POST", f"{prefix}/tokenize", {"messages": HI})
        await contract.ask("POST", f"{prefix}/tokenize", {}, status=400)
        await contract.ask("POST", f"{prefix}/detokenize", {"tokens": [5, 6]})
        await contract.ask("POST", f"{prefix}/detokenize", {"tokens": [-1]}, status=400)
    monitored = ("/health", "/load", "/ping", "/version", "/metrics")
    for path in (*monitored, "/tokenizer_info", "/v1/models", "/openapi.json", "/docs"):
        await contract.ask("GET", path)
    await contract.ask("POST", "/ping")
    await contract.ask("GET", "/v1/models/stub", rule="/v1/models/{model}")
    await contract.ask("GET", "/v1/models/other", rule="/v1/models/{model}", status=404)
    for method in ("GET", "POST"):
        await contract.ask(method, "/shutdown", status=202)


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
