"""/openapi.json and /docs say what the server does: every route, every field, and nothing else."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.server.helpers import ask, running
from tests.server.stub import open_stub
from trio_llm.config import AuthConfig, Config, LimitsConfig, ServerConfig
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.openapi.descriptions import field_descriptions
from trio_llm.server.openapi.document import OPERATIONS, document


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
    if operation.path == "/v1/engine/live":
        return  # It never ends; tests/server/test_live.py reads it.
    answer = await ask(app, "GET", operation.path)
    if answer.status >= 400:  # no data directory is open, or nobody to shut down
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return
    assert answer.status == operation.status
    assert answer.headers["content-type"].startswith(operation.media)
    if operation.media == ("application/json",):
        assert set(operation.keys) <= set(answer.json())


def test_everything_is_described_from_docstrings() -> None:
    """Every type and every field of every body and answer has a description, and so has every parameter."""
    whole = document(LimitsConfig())
    missing = [name for name, schema in whole["components"]["schemas"].items() if not schema.get("description")]
    for name, schema in whole["components"]["schemas"].items():
        assert "Attributes:" not in schema["description"]
        missing += [f"{name}.{field}" for field, part in schema["properties"].items() if not part.get("description")]
    operations = [operation for methods in whole["paths"].values() for operation in methods.values()]
    for operation in operations:
        missing += [one["name"] for one in operation.get("parameters", ()) if not one.get("description")]
    form = whole["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    missing += [field for field, part in form["properties"].items() if not part.get("description")]
    assert missing == []


def test_types_of_other_rooms_change_no_description() -> None:
    """A message of the same name outside the server does not take the place of a type of the API."""
    before = document(LimitsConfig())
    for name in before["components"]["schemas"]:
        msgspec.defstruct(name, [("other", int)], module="trio_llm.replay.frames")
    assert document(LimitsConfig()) == before


def test_docstrings_describe_only_fields_that_exist() -> None:
    """A field that was renamed or removed does not stay in a docstring."""
    for operation in OPERATIONS:
        for kind in (operation.body, operation.answer):
            if kind is not None:
                fields = {field.encode_name for field in msgspec.structs.fields(kind)}
                assert field_descriptions(kind).keys() - fields == set(), kind


async def test_the_document_is_made_when_it_is_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start does not wait for it."""
    made: list[str] = []

    def counted(limits: LimitsConfig, model: str) -> dict[str, Any]:
        made.append(model)
        return document(limits, model)

    monkeypatch.setattr("trio_llm.server.openapi.document.document", counted)
    async with open_stub() as engine:
        app = create_app(engine, Config(server=ServerConfig(served_model_name=("me",))))
        assert made == []
        first, second = [(await ask(app, "GET", "/openapi.json")).json() for _ in range(2)]
    assert first == second == document(LimitsConfig(), "me")
    assert made == ["me"]


async def test_examples_are_answered(tmp_path: Path) -> None:
    """The page can try every operation: the example of every body is answered."""
    config = Config(server=ServerConfig(served_model_name=("me",), data_dir=str(tmp_path / "data")))
    async with open_stub(record=str(tmp_path / "records")) as engine:
        app = create_app(engine, config)
        paths = (await ask(app, "GET", "/openapi.json")).json()["paths"]
        async with running(app):
            for path, methods in paths.items():
                content = methods.get("post", {}).get("requestBody", {}).get("content", {})
                if "application/json" in content:
                    answer = await ask(app, "POST", path, content["application/json"]["example"])
                    assert answer.status == 200, (path, answer.body)


async def test_the_page_loads_nothing_from_elsewhere(app: ServerApp) -> None:
    """/docs is Swagger UI: what it loads comes from this server, and its policy allows nothing else."""
    page = await ask(app, "GET", "/docs")
    links: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(value or "" for name, value in attrs if name in {"href", "src"})
            assert not [name for name, _ in attrs if name.startswith("on")]

    Reader().feed(page.body.decode())
    assert links == ["data:,", "docs/swagger-ui.css", "openapi.json", "docs/swagger-ui-bundle.js", "docs/start.js"]
    assert b'name="viewport"' in page.body
    for link in links[1:]:
        answer = await ask(app, "GET", f"/{link}")
        assert answer.status == 200
        kind = {"css": "text/css", "js": "text/javascript", "json": "application/json"}[link.rsplit(".", 1)[1]]
        assert answer.headers["content-type"].startswith(kind)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "http" not in policy and "unsafe-eval" not in policy
    for name in ("LICENSE", "..%2f__init__.py", "nope.js"):
        assert (await ask(app, "GET", f"/docs/{name}")).status == 404


async def test_the_document_needs_a_key_where_there_are_any() -> None:
    """With keys, the document is no more open than the rest."""
    async with open_stub() as engine:
        app = create_app(engine, Config(auth=AuthConfig(api_keys=("sk-0123456789abcdef",))))
        for path in ("/openapi.json", "/docs"):
            assert (await ask(app, "GET", path)).status == 401
