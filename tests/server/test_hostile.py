"""Hostile values in every field of every JSON endpoint: answered or refused by name, never a 5xx.

The fields are read from the types of the bodies, so a new field is tried without a line here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from msgspec import Struct, inspect

from tests.server.helpers import Answer, ask
from tests.server.stub import StubRunner, open_stub
from trio_llm.config import AuthConfig, Config
from trio_llm.server.anthropic.body import CountTokensBody, MessagesBody
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.bodies.types import ChatBody, CompletionBody
from trio_llm.server.openai.embeddings import EmbeddingBody
from trio_llm.server.openai.responses_body import ResponsesBody
from trio_llm.server.openai.tokenization import DetokenizeBody, TokenizeBody

HI = [{"role": "user", "content": "hi"}]
ENDPOINTS: dict[str, tuple[type[Struct], dict[str, Any]]] = {
    "/v1/completions": (CompletionBody, {"prompt": "a", "max_tokens": 2}),
    "/v1/chat/completions": (ChatBody, {"messages": HI, "max_tokens": 2}),
    "/v1/responses": (ResponsesBody, {"model": "stub", "input": "hi", "max_output_tokens": 2}),
    "/v1/messages": (MessagesBody, {"model": "stub", "messages": HI, "max_tokens": 2}),
    "/v1/messages/count_tokens": (CountTokensBody, {"model": "stub", "messages": HI}),
    "/v1/embeddings": (EmbeddingBody, {"input": "a"}),
    "/tokenize": (TokenizeBody, {"prompt": "a"}),
    "/detokenize": (DetokenizeBody, {"tokens": [5]}),
}
DEEP: Any = json.loads("[" * 20 + "]" * 20)
# As JSON text: some of these have no Python value that would be written so.
VALUES = [
    json.dumps(value)
    for value in (
        0, -1, 1, 0.5, -0.0, 5e-324, 1e308, 2**31, 2**63 - 1, 2**63, 10**19, True, False,
        "", "x", "\0", "é🤗", "x" * 5000,
        "<|im_end|>", "\u202e", [], [[]], [0], [-1], [2**40], ["", "x"], [None], [[5], "x"], DEEP, {}, {"": ""},
        {"self": 1, "type": "x"}, {"type": "text", "text": 1}, [{"type": "function"}], {"a": {"b": DEEP}},
    )
]  # fmt: skip
VALUES += ["NaN", "1e400", '"\\ud800"', '{"\\udc00":1}', "1" * 30, "[" * 200 + "]" * 200]


def fields_of(kind: type[Struct]) -> list[str]:
    """Return the names of a body's fields."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return [field.encode_name for field in info.fields]


CASES = [(path, field) for path, (kind, _) in ENDPOINTS.items() for field in fields_of(kind)]


def check(answer: Answer, what: str) -> None:
    """Fail on a 5xx, and on an error that says nothing."""
    assert answer.status < 500, (what, answer.body)
    if answer.status != 200:
        assert answer.json()["error"]["message"], what


def app_of(engine: Any) -> ServerApp:
    """Return an app without rate limits."""
    return create_app(engine, Config(auth=AuthConfig(rate_limit_requests=0)))


@pytest.mark.parametrize(("path", "field"), CASES)
async def test_no_value_of_a_field_is_a_server_error(path: str, field: str) -> None:
    """Each of these values in one field gets an answer, or a 4xx with a message."""
    base = {name: json.dumps(value) for name, value in ENDPOINTS[path][1].items()}
    async with open_stub(StubRunner(max_model_len=256)) as engine:
        app = app_of(engine)
        for value in VALUES:
            body = "{" + ",".join(f'"{name}":{text}' for name, text in {**base, field: value}.items()) + "}"
            check(await ask(app, "POST", path, body.encode()), body[:300])


def test_there_are_many() -> None:
    """The suite has at least the 555 cases that it began with."""
    assert len(CASES) * len(VALUES) >= 555


def random_value(chance: random.Random, info: inspect.Type) -> Any:
    """Make up a value of a type, within the bounds that the type has."""
    match info:
        case inspect.UnionType(types):
            return random_value(chance, chance.choice(types))
        case inspect.NoneType():
            return None
        case inspect.BoolType():
            return chance.random() < 0.5
        case inspect.IntType(gt=_, ge=least, lt=_, le=most):
            return chance.choice((least or 0, chance.randint(least or 0, min(most or 5, 5)), most or 3))
        case inspect.FloatType(gt=above, ge=least, lt=_, le=most):
            low = above if above is not None else least
            return chance.uniform(0.01 if low is None or above is not None else low, 1.0 if most is None else most)
        case inspect.LiteralType(values):
            return chance.choice(values)
        case inspect.StrType():
            return chance.choice(("x", "hi", "a b", "日本🤗", "<|im_end|>", "0"))
        case inspect.ListType(item):
            return [random_value(chance, item) for _ in range(chance.randint(1, 3))]
        case inspect.DictType():
            return chance.choice(({}, {"a": "b"}, {"5": 1}, {"type": "object"}))
        case inspect.StructType(fields=fields):
            tag = {info.tag_field: info.tag} if info.tag_field is not None else {}
            return {**tag, **random_fields(chance, fields, 0.4)}
        case _:
            return chance.choice((1, "x", [5, 6], {}))


def random_fields(chance: random.Random, fields: tuple[inspect.Field, ...], part: float) -> dict[str, Any]:
    """Make up an object: all of its required fields, and a part of the others."""
    chosen = [field for field in fields if field.required or chance.random() < part]
    return {field.encode_name: random_value(chance, field.type) for field in chosen}


def random_requests(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Make up requests, most of whose bodies are valid, over all endpoints and fields."""
    chance = random.Random(seed)
    for _ in range(count):
        path, (kind, base) = chance.choice(list(ENDPOINTS.items()))
        info = inspect.type_info(kind)
        assert isinstance(info, inspect.StructType)
        yield path, msgspec.json.encode({**random_fields(chance, info.fields, 0.15), **base})


async def ask_random(seed: int, count: int) -> dict[int, int]:
    """Ask made-up requests; the number of answers of each status. Fails on a 5xx."""
    statuses: dict[int, int] = {}
    async with open_stub(StubRunner(max_model_len=256)) as engine:
        app = app_of(engine)
        for path, body in random_requests(seed, count):
            answer = await ask(app, "POST", path, body)
            check(answer, f"{path} {body.decode()}")
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
    return statuses


async def test_no_random_request_is_a_server_error() -> None:
    """Of made-up requests over all parameters none is a 5xx, and enough of them are answered to mean something."""
    statuses = await ask_random(seed=1, count=600)
    assert statuses[200] > 60, statuses


@pytest.mark.requests_full
@pytest.mark.parametrize("seed", range(10))
async def test_none_of_twenty_thousand_random_requests_is_a_server_error(seed: int) -> None:
    """The same for 2,000 requests of each of ten seeds: `pytest -m requests_full tests/server/test_hostile.py`."""
    statuses = await ask_random(seed=100 + seed, count=2000)
    assert statuses[200] > 1000, statuses
