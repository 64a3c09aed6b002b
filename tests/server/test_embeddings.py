"""POST /v1/embeddings over a real engine and a stub model whose vectors are known."""

from __future__ import annotations

import base64
import struct
import threading
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from trio.testing import MockClock

from tests.server.client import use_client
from tests.server.helpers import ask, running
from tests.server.stub import TOKENIZER, StubRunner, embedding, open_stub
from trio_llm.config import AuthConfig, Config
from trio_llm.messages import StepPlan
from trio_llm.params import PoolingParams
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.openai import embeddings

KEY = {"x-api-key": "sk-0123456789abcdef"}


@pytest.fixture
async def runner() -> StubRunner:
    """Return a stub model."""
    return StubRunner()


@pytest.fixture
async def app(runner: StubRunner) -> AsyncIterator[ServerApp]:
    """Return an open app round it."""
    async with open_stub(runner) as engine:
        yield create_app(engine, Config())


async def embed(app: ServerApp, given: Any, status: int = 200, **fields: Any) -> Any:
    """Ask for embeddings."""
    answer = await ask(app, "POST", "/v1/embeddings", {"input": given, **fields})
    assert answer.status == status, answer.body
    return answer.json() if status == 200 else answer.json()["error"]


def known(text: str) -> list[float]:
    """Return the stub's vector for a text."""
    return list(embedding(TOKENIZER.encode(text)))


async def test_every_form_of_input(app: ServerApp) -> None:
    """A text, texts, token ids and lists of ids are each answered in order, and their tokens are counted."""
    assert [item["embedding"] for item in (await embed(app, "cat"))["data"]] == [known("cat")]
    both = await embed(app, ["cat", "horse"])
    assert [(item["index"], item["embedding"]) for item in both["data"]] == [(0, known("cat")), (1, known("horse"))]
    assert both["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    assert (await embed(app, TOKENIZER.encode("cat")))["data"] == (await embed(app, "cat"))["data"]
    ids = [TOKENIZER.encode("cat"), TOKENIZER.encode("horse")]
    assert (await embed(app, ids))["data"] == both["data"]


async def test_base64_is_little_endian_float32(app: ServerApp) -> None:
    """The base64 form holds the same numbers as the list."""
    data = (await embed(app, "cat", encoding_format="base64"))["data"][0]["embedding"]
    assert list(struct.unpack("<4f", base64.b64decode(data))) == known("cat")


async def test_what_the_model_is_asked(app: ServerApp, runner: StubRunner) -> None:
    """pooling, normalize and dimensions reach the model."""
    seen: list[Any] = []

    def hook(plan: StepPlan) -> None:
        seen.extend(admission.params for admission in plan.admitted)

    runner.hook = hook
    await embed(app, "cat")
    await embed(app, "cat", pooling="last", normalize=False, dimensions=2)
    assert seen == [PoolingParams(), PoolingParams(pooling="last", normalize=False, dimensions=2)]


@pytest.mark.parametrize(
    ("given", "fields", "param"),
    [
        ("", {}, "input"),
        ([], {}, "input"),
        ([[]], {}, "input"),
        (["a", ""], {}, "input"),
        ([1.5], {}, "input"),
        ([10**6], {}, "input"),
        (["a", [10**6]], {}, "input"),
        ("x", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("x" * 513, {}, "input"),
        ([1] * 513, {}, "input"),
        ("x", {"dimensions": 5}, "dimensions"),
        ("x", {"dimensions": 0}, "dimensions"),
        ("x", {"encoding_format": "bytes"}, "encoding_format"),
        ("x", {"pooling": "cls"}, "pooling"),
    ],
)
async def test_what_cannot_be_embedded(app: ServerApp, given: Any, fields: dict[str, Any], param: str) -> None:
    """A wrong input is a 400 that names the field; nothing of it reaches the model."""
    error = await embed(app, given, status=400, **fields)
    assert error["param"] == param
    assert param in error["message"] and "prompt =" not in error["message"]


async def test_too_long_is_cut_where_asked(app: ServerApp) -> None:
    """truncate_prompt_tokens keeps the end; a context's length fits without it."""
    assert (await embed(app, "x" * 600 + "cat", truncate_prompt_tokens=3))["data"][0]["embedding"] == known("cat")
    assert (await embed(app, "x" * 600, truncate_prompt_tokens=-1))["usage"]["prompt_tokens"] == 512
    assert (await embed(app, "x" * 512))["usage"]["prompt_tokens"] == 512


async def test_many_inputs_are_all_answered(app: ServerApp) -> None:
    """More inputs than wait in the engine at once come back complete and in order."""
    texts = [f"number {number}" for number in range(100)]
    data = (await embed(app, texts))["data"]
    assert [item["embedding"] for item in data] == [known(text) for text in texts]


async def test_large_answers_are_written_off_the_event_loop(app: ServerApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many numbers are collected and written in a worker thread, few on the event loop; the answers are equal."""
    threads: list[threading.Thread] = []

    def written(answer: Any) -> Any:
        threads.append(threading.current_thread())
        return encode(answer)

    encode = msgspec.json.encode
    monkeypatch.setattr(msgspec.json, "encode", written)
    few = await embed(app, ["cat", "horse"])
    monkeypatch.setattr(embeddings, "_NUMBERS_PER_CHAR", 1 / 1000)
    many = await embed(app, ["cat", "horse"])
    assert few["data"] == many["data"]
    assert [thread is threading.current_thread() for thread in threads] == [True, False]


@pytest.fixture
async def limited(runner: StubRunner) -> AsyncIterator[ServerApp]:
    """Return an app whose one key may spend a thousand tokens."""
    auth = AuthConfig(
        api_keys=(KEY["x-api-key"],), rate_limit_requests=0, rate_limit_tokens=1000, rate_limit_window_secs=3600
    )
    async with open_stub(runner) as engine:
        yield create_app(engine, Config(auth=auth))


async def spent(app: ServerApp) -> int:
    """Return how many tokens the caller was charged."""
    return 1000 - int((await ask(app, "GET", "/v1/models", headers=KEY)).headers["x-ratelimit-remaining-tokens"])


async def test_what_is_computed_is_charged(limited: ServerApp, runner: StubRunner, mock_clock: MockClock) -> None:
    """Each input is charged as it is finished, also if another one fails; the usage of an answer is the same."""
    answer = await ask(limited, "POST", "/v1/embeddings", {"input": ["cat", "horse"]}, headers=KEY)
    assert answer.json()["usage"]["prompt_tokens"] == 8
    assert await spent(limited) == 8

    plans: list[StepPlan] = []

    def fail_later(plan: StepPlan) -> None:
        plans.append(plan)
        if len(plans) > 1:
            raise RuntimeError

    runner.hook = fail_later
    answer = await ask(limited, "POST", "/v1/embeddings", {"input": [[1, 2, 3]] * 200}, headers=KEY)
    assert answer.status == 500
    finished = sum(plans[0].counts)
    assert finished > 0
    assert await spent(limited) == 8 + finished


async def test_a_token_that_the_model_does_not_have_is_refused_before_any_work(
    limited: ServerApp, runner: StubRunner
) -> None:
    """One wrong input of many costs nothing, neither of the model's time nor of the caller's tokens."""
    body = {"input": [[1, 2, 3]] * 200 + [[99999]]}
    answer = await ask(limited, "POST", "/v1/embeddings", body, headers=KEY)
    assert (answer.status, answer.json()["error"]["param"]) == (400, "input")
    assert runner.plans == [] and await spent(limited) == 0


async def test_the_openai_client(runner: StubRunner) -> None:
    """client.embeddings.create, which asks for base64 by itself, gives the numbers; so does float."""
    async with open_stub(runner) as engine, running(create_app(engine, Config())) as server:

        def use(client: Any) -> list[Any]:
            create = client.embeddings.create
            return [
                create(model="stub", input=["cat", "dog"]),
                create(model="stub", input="cat", encoding_format="float"),
            ]

        both, one = await use_client(server, use)
    assert [item.embedding for item in both.data] == [known("cat"), known("dog")]
    assert one.data[0].embedding == known("cat")
    assert both.usage.total_tokens == 6


async def test_keys_share_no_cached_prompts(runner: StubRunner) -> None:
    """With several keys, what one of them embeds speeds up its own requests alone: timing tells no tales."""
    keys = ("sk-0123456789abcdef", "sk-fedcba9876543210")
    computed: list[int] = []
    runner.hook = lambda plan: computed.append(sum(plan.counts))
    async with open_stub(runner) as engine:
        app = create_app(engine, Config(auth=AuthConfig(api_keys=keys)))
        headers = [{"authorization": f"Bearer {key}"} for key in keys]
        body = {"prompt": "x" * 100, "max_tokens": 1}
        await ask(app, "POST", "/v1/embeddings", {"input": "x" * 100}, headers=headers[0])
        for who in reversed(headers):
            assert (await ask(app, "POST", "/v1/completions", body, headers=who)).status == 200
    assert computed[:2] == [100, 100]
    assert computed[2] < 100
