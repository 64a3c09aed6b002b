"""What a key may spend and open: tokens per window, the administrators' door, and metrics for everybody."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from tests.server.helpers import Answer, ask, exchange
from tests.server.stub import GatedWorker, StubRunner, open_stub
from trio_llm.config import AuthConfig, Config
from trio_llm.engine import Engine
from trio_llm.server.app import create_app

KEYS = ("sk-ordinary", "sk-second")
ADMIN = "sk-administrator"
REMOTE = ("192.0.2.7", 1234)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    """Open an engine round a stub."""
    async with open_stub() as engine:
        yield engine


@attrs.define
class Clock:
    """A clock that stands until it is told."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def limited(engine: Engine, clock: Clock, tokens: int, requests: int = 0) -> Any:
    """Return an app whose keys have so many tokens a minute."""
    auth = AuthConfig(api_keys=KEYS, rate_limit_requests=requests, rate_limit_tokens=tokens, rate_limit_window_secs=60)
    return create_app(engine, Config(auth=auth), clock=clock)


async def complete(app: Any, key: str = KEYS[0], **body: Any) -> Answer:
    """Ask for a completion of a prompt of four tokens."""
    body = {"prompt": "abcd", "ignore_eos": True, **body}
    return await ask(app, "POST", "/v1/completions", body, headers={"x-api-key": key, **JSON})


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_charged_when_they_are_known(engine: Engine, stream: bool) -> None:
    """Prompt and answer are taken from the key's bucket, which says so; overdrawn, it is a 429 until it is refilled."""
    clock = Clock()
    app = limited(engine, clock, 60)
    first = await complete(app, max_tokens=26, stream=stream)
    assert (first.headers["x-ratelimit-limit-tokens"], first.headers["x-ratelimit-remaining-tokens"]) == ("60", "60")
    second = await complete(app, max_tokens=46, stream=stream)
    assert second.headers["x-ratelimit-remaining-tokens"] == "30"
    refused = await complete(app)
    assert (refused.status, refused.headers["retry-after"]) == (429, "21")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    assert (await complete(app, KEYS[1], max_tokens=1)).status == 200
    clock.now_s = 21
    assert (await complete(app, max_tokens=1)).status == 200


async def test_samples_share_their_prompt(engine: Engine) -> None:
    """N samples cost their prompt once, and a refused body costs nothing."""
    app = limited(engine, Clock(), 100)
    assert (await complete(app, max_tokens=5, n=3, temperature=1, seed=1)).status == 200
    assert (await complete(app, max_tokens=-1)).status == 400
    assert (await complete(app, max_tokens=1)).headers["x-ratelimit-remaining-tokens"] == str(100 - 4 - 3 * 5)


async def test_who_hangs_up_pays_for_what_was_made() -> None:
    """A client that leaves in the middle of a stream is charged for the prompt and the tokens it was sent."""
    worker = GatedWorker()
    async with open_stub(StubRunner(), worker=worker) as engine:
        app = limited(engine, Clock(), 100)
        body = b'{"prompt": "abcd", "max_tokens": 50, "ignore_eos": true, "stream": true}'
        call = exchange(app, "POST", "/v1/completions", body, headers={"x-api-key": KEYS[0], **JSON})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.run)
            worker.let(3)
            await trio.testing.wait_all_tasks_blocked()
            call.disconnect()
        worker.open = True
        worker.let(1)
        told = await complete(app, max_tokens=1)
    assert 100 - 4 - 4 <= int(told.headers["x-ratelimit-remaining-tokens"]) <= 100 - 4 - 1


async def test_a_refusal_for_tokens_takes_no_request(engine: Engine) -> None:
    """A request that the empty token bucket refuses leaves the bucket of requests as it was; both stand in headers."""
    app = limited(engine, Clock(), 5, requests=3)
    spent = await complete(app, max_tokens=20)
    assert spent.headers["x-ratelimit-remaining-requests"] == "2"
    refused = await complete(app)
    assert refused.status == 429
    assert "x-ratelimit-remaining-requests" not in refused.headers


async def test_embeddings_cost_their_input(engine: Engine) -> None:
    """Embeddings are charged for the tokens of all their inputs."""
    app = limited(engine, Clock(), 100)
    headers = {"x-api-key": KEYS[0], **JSON}
    assert (await ask(app, "POST", "/v1/embeddings", {"input": [[1, 2, 3], [4, 5]]}, headers=headers)).status == 200
    assert (await complete(app, max_tokens=1)).headers["x-ratelimit-remaining-tokens"] == "95"


@pytest.mark.parametrize(("key", "status"), [(None, 401), (KEYS[0], 403), (ADMIN, 202)])
async def test_only_administrators_shut_down_where_there_are_any(engine: Engine, key: str | None, status: int) -> None:
    """With administrators' keys an ordinary one does not open /shutdown; theirs opens it, and the API too."""
    config = Config(auth=AuthConfig(api_keys=KEYS, admin_api_keys=(ADMIN,)))
    app = create_app(engine, config, shutdown=lambda: None)
    headers = {"x-api-key": key} if key else {}
    assert (await ask(app, "GET", "/shutdown", headers=headers)).status == status
    assert (await ask(app, "GET", "/v1/models", headers=headers)).status == (200 if key else 401)


async def test_metrics_can_be_for_everybody(engine: Engine) -> None:
    """auth.public_metrics opens /metrics to remote peers without a key, and nothing else."""
    app = create_app(engine, Config(auth=AuthConfig(api_keys=KEYS, public_metrics=True)))
    assert (await ask(app, "GET", "/metrics", client=REMOTE)).status == 200
    assert (await ask(app, "GET", "/v1/models", client=REMOTE)).status == 401
