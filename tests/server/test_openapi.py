"""/openapi.json and /docs say what the server does: every route, every field, and nothing else."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest

from tests.server.helpers import ask
from tests.server.stub import open_stub
from trio_llm.config import AuthConfig, Config, LimitsConfig
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.openapi import OPERATIONS, document


@pytest.fixture
async def app() -> AsyncIterator[ServerApp]:
    """Return an open app."""
    async with open_stub() as engine:
        yield create_app(engine, Config())


async def test_routes_and_document_are_the_same(app: ServerApp) -> None:
    """Both ways: every route stands in the document, and what stands there is a route."""
    routes = {
        (method.lower(), re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    told = {(method, path) for path, methods in document(LimitsConfig())["paths"].items() for method in methods}
    assert told == routes


def test_every_field_of_a_body_is_described() -> None:
    """A body's schema has exactly the fields that requests are checked for, with the same ones required."""
    schemas = document(LimitsConfig())["components"]["schemas"]
    for operation in OPERATIONS:
        if operation.body is not None:
            fields = msgspec.structs.fields(operation.body)
            schema = schemas[operation.body.__name__]
            assert set(schema["properties"]) == {field.encode_name for field in fields}
            assert set(schema.get("required", ())) == {field.encode_name for field in fields if field.required}


def test_references_lead_somewhere() -> None:
    """Every $ref names a schema of the document, and every operation has a name of its own."""
    whole = document(LimitsConfig())

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            inner = set().union(*[references(value) for value in node.values()])
            return inner | ({node["$ref"]} if isinstance(node.get("$ref"), str) else set())
        return set().union(*[references(item) for item in node]) if isinstance(node, list) else set()

    names = {reference.rsplit("/", 1)[1] for reference in references(whole)}
    assert names
    assert names <= set(whole["components"]["schemas"])
    ids = [operation["operationId"] for methods in whole["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "operation", [o for o in OPERATIONS if o.method == "get" and "{" not in o.path], ids=lambda o: o.path
)
async def test_answers_are_what_the_document_says(app: ServerApp, operation: Any) -> None:
    """What can be asked for without more is answered in the media type and with the keys that the document promises."""
    answer = await ask(app, "GET", operation.path)
    if answer.status >= 400:  # no data directory is open, or nobody to shut down
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return
    assert answer.status == operation.status
    assert answer.headers["content-type"].startswith(operation.media)
    if operation.media == ("application/json",):
        assert set(operation.keys) <= set(answer.json())


async def test_the_page_is_whole_and_loads_nothing(app: ServerApp) -> None:
    """/docs names every path and every field, is well formed where it matters, and refers to no other host."""
    answer = await ask(app, "GET", "/docs")
    text = answer.body.decode()
    links: list[str] = []
    ids: set[str] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in {"script", "img", "link", "iframe"}
            links.extend(value or "" for name, value in attrs if name in {"href", "src"})
            ids.update(value or "" for name, value in attrs if name == "id")

    Reader().feed(text)
    assert all(link == "openapi.json" or link[1:] in ids for link in links)
    for operation in OPERATIONS:
        assert f"<code>{operation.path}</code>" in text
    for schema in document(LimitsConfig())["components"]["schemas"].values():
        for field in schema.get("properties", ()):
            assert f"<code>{field}</code>" in text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


async def test_the_document_needs_a_key_where_there_are_any() -> None:
    """With keys, the document is no more open than the rest."""
    async with open_stub() as engine:
        app = create_app(engine, Config(auth=AuthConfig(api_keys=("sk-0123456789abcdef",))))
        for path in ("/openapi.json", "/docs"):
            assert (await ask(app, "GET", path)).status == 401
