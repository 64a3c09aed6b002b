"""Row by row: what chat and completions accept has its effect, and what they do not is a 400 that names it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import attrs
import msgspec
import pytest

from tests.server.helpers import Answer, ask
from tests.server.parameters import CHAT, COMPLETIONS, ROWS, USER, Row, Seen
from tests.server.stub import TOKENIZER, StubRunner, open_stub
from trio_llm.config import Config
from trio_llm.messages import Admission
from trio_llm.params import SamplingParams
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.bodies.foreign_fields import hinted_fields, unsupported_fields
from trio_llm.server.bodies.types import ChatBody, CompletionBody

BASE: dict[str, dict[str, Any]] = {CHAT: {"messages": USER}, COMPLETIONS: {"prompt": "hi"}}
CASES = [
    pytest.param(row, path, id=f"{row.name}-{'chat' if path == CHAT else 'completions'}")
    for row in ROWS
    for path in row.paths
]


@attrs.define
class Model:
    """An app round a stub, and what the stub was told of each sequence."""

    app: ServerApp
    admitted: list[Admission]


@pytest.fixture
async def model(request: pytest.FixtureRequest) -> AsyncIterator[Model]:
    """Return an open app that remembers what its model is given."""
    admitted: list[Admission] = []
    row = request.node.callspec.params.get("row") if hasattr(request.node, "callspec") else None
    context = 2048 if row is None or row.name in ("messages", "tools") else 512  # The prompt of tools is long.
    runner = StubRunner(hook=lambda plan: admitted.extend(plan.admitted), max_model_len=context)
    async with open_stub(runner, enable_prefix_caching=False) as engine:
        yield Model(create_app(engine, Config()), admitted)


def body_of(row: Row, path: str, value: Any) -> dict[str, Any]:
    """Return a request with the parameter in it, and of several fields those that the path knows."""
    fields = value if isinstance(value, dict) and row.name in value else {row.name: value}
    other = {"messages"} if path == COMPLETIONS else {"prompt"}
    known = {name: item for name, item in fields.items() if name == row.name or name not in other}
    return {**BASE[path], "max_tokens": 4, **known} if row.name != "max_completion_tokens" else {**BASE[path], **known}


def seen(path: str, answer: Answer, admitted: list[Admission]) -> Seen:
    """Put together what came of a request."""
    streams = answer.body.startswith(b"data: ")
    chunks = answer.events()[:-1] if streams else []
    (first, *_) = admitted
    assert isinstance(first.params, SamplingParams)
    prompt = TOKENIZER.decode(first.token_ids, skip_special_tokens=False)
    whole = chunks[0] if streams else answer.json()
    return Seen(path, first.params, len(admitted), prompt, whole, chunks, answer.headers.get("warning", ""))


@pytest.mark.parametrize(("row", "path"), CASES)
async def test_good_values_have_their_effect(model: Model, row: Row, path: str) -> None:
    """A good value is answered without a word of unknown fields, and does what it says; null is the same as absent."""
    for value, effect in row.good:
        model.admitted.clear()
        answer = await ask(model.app, "POST", path, body_of(row, path, value))
        assert answer.status == 200, (value, answer.body)
        assert "unknown" not in answer.headers.get("warning", ""), value
        assert effect(seen(path, answer, model.admitted)), (value, answer.body)
    if row.name not in ("messages", "prompt"):
        assert (await ask(model.app, "POST", path, body_of(row, path, None))).status == 200


@pytest.mark.parametrize(("row", "path"), CASES)
async def test_bad_values_are_refused_by_name(model: Model, row: Row, path: str) -> None:
    """A bad value is a 400 whose param is the parameter, or a place inside it, and whose message names it."""
    for value in row.bad:
        answer = await ask(model.app, "POST", path, body_of(row, path, value))
        assert answer.status == 400, (value, answer.status)
        error = answer.json()["error"]
        assert error["param"].split(".")[0].split("[")[0] == row.name, (value, error)
        assert row.name in error["message"], (value, error)
        assert not re.search(r"\(\S+,\)", error["message"]), (value, "a tuple is no word of the API", error)
    assert not model.admitted


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_rendering_says_what_the_model_would_be_given(model: Model, path: str) -> None:
    """The render endpoint has the tokens and parameters of the answer, or its error; and it generates nothing."""
    values = [
        (row, value) for row in ROWS if path in row.paths for value in (*(good for good, _ in row.good), *row.bad)
    ]
    for row, value in values:
        model.admitted.clear()
        body = body_of(row, path, value)
        rendered = await ask(model.app, "POST", f"{path}/render", body)
        assert not model.admitted
        answer = await ask(model.app, "POST", path, body)
        assert rendered.status == answer.status, (row.name, value)
        assert rendered.headers.get("warning") == answer.headers.get("warning"), (row.name, value)
        if answer.status != 200:
            assert rendered.json() == answer.json(), (row.name, value)
            continue
        one = rendered.json()[0] if path == COMPLETIONS else rendered.json()
        (first, *_) = model.admitted
        assert isinstance(first.params, SamplingParams)
        assert one["token_ids"] == list(first.token_ids)
        params = one["sampling_params"]
        assert (params["n"], params["bad_words"]) == (body.get("n") or 1, body.get("bad_words") or [])
        assert params["seed"] in (None, first.params.seed)
        given = {name: getattr(first.params, name) for name in params.keys() - {"n", "bad_words", "seed"}}
        given["logit_bias"] = given["logit_bias"] or None
        expected = msgspec.json.decode(msgspec.json.encode(given))
        assert {name: params[name] for name in given} == expected, (row.name, value)


def test_the_table_has_a_row_for_every_parameter() -> None:
    """A field that is added to a body, or to those refused by name, needs a row here."""
    for path, kind in ((CHAT, ChatBody), (COMPLETIONS, CompletionBody)):
        known = {field.encode_name for field in msgspec.structs.fields(kind)}
        known |= {*unsupported_fields(kind), *hinted_fields(kind)}
        assert known - {row.name for row in ROWS if path in row.paths} == set()
