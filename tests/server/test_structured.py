"""response_format and structured_outputs over HTTP: whatever the model wants to say, its answer has the form."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.client import use_client
from tests.server.helpers import ask, running
from tests.server.stub import StubRunner, open_stub
from trio_llm.assemble import open_engine
from trio_llm.config import Config
from trio_llm.messages import StepPlan
from trio_llm.server.app import ServerApp, create_app

HI: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


@pytest.fixture
async def app() -> AsyncIterator[ServerApp]:
    """Return an open app round a model that wants to say letters."""
    async with open_stub(StubRunner()) as engine:
        yield create_app(engine, Config())


async def chat(app: ServerApp, status: int = 200, **fields: Any) -> Any:
    """Ask for a chat; return the body, or the error."""
    body = {"messages": HI, "max_tokens": 300, **fields}
    answer = await ask(app, "POST", "/v1/chat/completions", body)
    assert answer.status == status, answer.body
    return answer.json() if status == 200 else answer.json()["error"]


def check_person(text: str) -> None:
    """Check that a text is JSON of SCHEMA."""
    person = json.loads(text)
    assert set(person) == {"name", "age", "tags"}
    assert len(person["name"]) <= 8
    assert 0 <= person["age"] <= 99
    assert set(person["tags"]) <= {"a", "b"}


async def test_json_schema_with_several_samples(app: ServerApp) -> None:
    """All of n samples satisfy the schema, and end by themselves."""
    choices = (await chat(app, response_format=JSON_SCHEMA, n=4, temperature=1, seed=1))["choices"]
    assert len(choices) == 4
    for choice in choices:
        check_person(choice["message"]["content"])
        assert choice["finish_reason"] == "stop"


async def test_json_object(app: ServerApp) -> None:
    """json_object is an object, whatever else it is."""
    choice = (await chat(app, response_format={"type": "json_object"}))["choices"][0]
    assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize(
    ("form", "accepts"),
    [
        ({"regex": "[0-9]{3}-[a-c]+x"}, lambda text: re.fullmatch(r"[0-9]{3}-[a-c]+x", text)),
        ({"choice": ["red", "green", "blaugrün 🎈", 'quo"te\\ and\nline']},
         lambda text: text in ["red", "green", "blaugrün 🎈", 'quo"te\\ and\nline']),
        ({"choice": ["🎈"]}, lambda text: text == "🎈"),
        ({"grammar": 'start: "a" ("b" | "c") "d"'}, lambda text: re.fullmatch("a[bc]d", text)),
        ({"grammar": 'root ::= "a" ("b" | "c") "d"'}, lambda text: re.fullmatch("a[bc]d", text)),
        ({"json": SCHEMA}, lambda text: check_person(text) is None),
        ({"json": json.dumps(SCHEMA), "disable_any_whitespace": True}, lambda text: check_person(text) is None),
        ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_every_form(app: ServerApp, path: str, form: dict[str, Any], accepts: Any) -> None:
    """Each form of structured_outputs holds in chat and in completions, and streamed text is the same text."""
    asked = {"messages": HI} if "chat" in path else {"prompt": "hi"}
    body = {**asked, "structured_outputs": form, "max_tokens": 400}
    whole = (await ask(app, "POST", path, body)).json()["choices"][0]
    text = whole["message"]["content"] if "chat" in path else whole["text"]
    assert accepts(text), text
    assert whole["finish_reason"] == "stop"
    *chunks, _ = (await ask(app, "POST", path, {**body, "stream": True})).events()
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(c["delta"].get("content", "") if "chat" in path else c["text"] for c in choices) == text


async def test_prompts_in_chunks(app: ServerApp) -> None:
    """A prompt computed in several steps counts for nothing in the grammar."""
    async with open_stub(StubRunner(), max_num_batched_tokens=16) as engine:
        small = create_app(engine, Config())
        body = {"prompt": "x" * 100, "structured_outputs": {"choice": ["yes"]}}
        assert (await ask(small, "POST", "/v1/completions", body)).json()["choices"][0]["text"] == "yes"


BOMB = "((a{1,1000}){1,1000}){1,1000}"
DEEP: dict[str, Any] = {}
for _ in range(24):
    DEEP = {"anyOf": [DEEP]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
         "response_format.json_schema.schema"),
        ({"response_format": JSON_SCHEMA, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["x" * 100_000]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "root ::= " + "(" * 100_000}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": ""}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[" * 100_000}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"$ref": "http://localhost/evil"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": False}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ],
)  # fmt: skip
async def test_bad_forms_are_refused(app: ServerApp, fields: dict[str, Any], param: str) -> None:
    """A form that is wrong, contradictory, endless or a bomb is a 400 that names the field, and hurts nobody else."""
    assert (await chat(app, status=400, **fields))["param"] == param
    assert (await chat(app, max_tokens=1))["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    "form", [{"json": DEEP}, {"regex": BOMB}, {"json": {"type": "string", "pattern": BOMB}}, {"regex": "(a+)+b"}]
)
async def test_bombs_are_answered_or_refused(app: ServerApp, form: dict[str, Any]) -> None:
    """Forms that cost other engines minutes or their lives cost this one nothing; the next request is answered."""
    body = {"messages": HI, "max_tokens": 5, "structured_outputs": form}
    assert (await ask(app, "POST", "/v1/chat/completions", body)).status in {200, 400}
    assert (await chat(app, max_tokens=1))["usage"]["completion_tokens"] == 1


async def test_the_cache_of_grammars_is_bounded(app: ServerApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many forms as clients like cost bounded memory; an equal form is compiled once."""
    monkeypatch.setattr(app.services.grammars, "_max_bytes", 20 * 67_000)
    for number in range(40):
        await chat(app, structured_outputs={"choice": [str(number)]}, max_tokens=4)
    await chat(app, structured_outputs={"choice": ["39"]}, max_tokens=4)
    assert len(app.services.grammars) == 20


async def test_the_form_is_compiled_off_the_loop(app: ServerApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling happens in a thread, so that a large form delays only who asked for it."""
    import threading

    where: list[threading.Thread] = []
    compile_grammar = app.services.grammars.compile

    def spy(source: Any) -> Any:
        where.append(threading.current_thread())
        return compile_grammar(source)

    monkeypatch.setattr(app.services.grammars, "compile", spy)
    await chat(app, structured_outputs={"choice": ["yes"]})
    assert where
    assert threading.current_thread() not in where


async def test_samples_share_one_grammar_object() -> None:
    """N samples are held to one compiled grammar, each by a matcher of its own."""
    runner = StubRunner()
    grammars: set[int] = set()

    def hook(plan: StepPlan) -> None:
        grammars.update(id(admission.params.grammar) for admission in plan.admitted)  # type: ignore[union-attr]

    runner.hook = hook
    async with open_stub(runner) as engine:
        await chat(create_app(engine, Config()), structured_outputs={"choice": ["yes", "no"]}, n=3, temperature=1)
    assert len(grammars) == 1


async def test_the_demo_model_writes_json() -> None:
    """The real client, socket, engine and model: the answer to a real question, in the form of a schema."""
    config = Config()
    question = "Make JSON for an owl named Zoe, age 7."
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "animal": {"enum": ["owl", "cat"]}, "age": {"type": "integer"}},
        "required": ["name", "animal", "age"],
        "additionalProperties": False,
    }

    def use(client: Any) -> tuple[Any, str, Any]:
        name = client.models.list().data[0].id
        create = client.chat.completions.create
        form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}}
        asked = {"model": name, "messages": [{"role": "user", "content": question}], "response_format": form}
        whole = create(**asked, temperature=0)
        chunks = create(**asked, temperature=0, stream=True)
        capital = create(
            model=name,
            messages=[{"role": "user", "content": "What is the capital of Japan?"}],
            temperature=0,
            extra_body={"structured_outputs": {"regex": "The capital of Japan is (Tokyo|Paris)"}},
        )
        return whole, "".join(chunk.choices[0].delta.content or "" for chunk in chunks), capital

    async with open_engine(config) as engine, running(create_app(engine, config)) as server:
        whole, streamed, capital = await use_client(server, use)
    text = whole.choices[0].message.content
    assert text == streamed
    pet = json.loads(text)
    assert pet == {"name": "Zoe", "animal": "owl", "age": 7}
    assert capital.choices[0].message.content == "The capital of Japan is Tokyo"
