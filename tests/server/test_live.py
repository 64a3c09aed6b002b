"""The engine's live state: what it says, to whom, how often, and that it costs nothing when nobody looks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from tests.server.helpers import Exchange, ask, exchange
from tests.server.stub import GatedWorker, StubRunner, open_stub
from trio_llm.config import AuthConfig, Config
from trio_llm.core.block_view import PoolMap
from trio_llm.engine import live
from trio_llm.replay import Replay
from trio_llm.server.app import ServerApp, create_app

KEYS = ("sk-0123456789abcdef", "sk-fedcba9876543210")
ADMIN = "sk-administrator-0123"
TEXT = "Once upon a time there was a king who had a daughter. "


def headers(key: str = KEYS[0]) -> dict[str, str]:
    """Return the headers of a caller."""
    return {"content-type": "application/json", "authorization": f"Bearer {key}"}


@attrs.define
class Watcher:
    """A client that reads frames one at a time."""

    call: Exchange

    async def frame(self) -> Any:
        """Read the next frame."""
        data = await self.call.chunks.receive()
        assert data.startswith(b"data: ") and data.endswith(b"\n\n")
        return json.loads(data[6:])


@asynccontextmanager
async def watching(app: ServerApp, **options: Any) -> AsyncIterator[Watcher]:
    """Watch the engine while the block runs."""
    call = exchange(app, "GET", "/v1/engine/live", **options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.run)
        yield Watcher(call)
        call.disconnect()
        nursery.cancel_scope.cancel()


async def complete(app: ServerApp, prompt: str = TEXT, key: str = KEYS[0], **fields: Any) -> Any:
    """Ask for a completion."""
    body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, **fields}
    answer = await ask(app, "POST", "/v1/completions", body, headers=headers(key))
    assert answer.status == 200, answer.body
    return answer.json()


async def test_a_frame_shows_requests_blocks_and_steps(autojump_clock: trio.testing.MockClock) -> None:
    """Two requests with the same prompt: their phases, shared blocks, and the steps, each of them once."""
    worker = GatedWorker()
    async with open_stub(StubRunner(), worker=worker) as engine:
        app = create_app(engine, Config())
        async with trio.open_nursery() as nursery, watching(app) as watcher:
            first = await watcher.frame()
            assert (first["running"], first["requests"], first["steps"]) == (0, [], [])
            assert first["pool"]["states"] == "f" * 128 and first["pool"]["total_blocks"] == 128
            nursery.start_soon(complete, app)
            worker.let(3)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(complete, app)
            worker.let(3)
            await trio.testing.wait_all_tasks_blocked()
            frame = await watcher.frame()
            frame = await watcher.frame()
            one, other = frame["requests"]
            assert (one["phase"], one["prompt_tokens"], one["cached_tokens"]) == ("decode", len(TEXT), 0)
            assert (other["phase"], other["cached_tokens"], other["blocks"]) == ("decode", 48, one["blocks"])
            assert one["generated_tokens"] > other["generated_tokens"] > 0
            assert one["age_s"] >= 0
            pool = frame["pool"]
            assert pool["states"].count("s") == 3 and pool["states"].count("u") == 2
            assert set(pool["owners"]) == {0, one["number"], other["number"]}
            assert max(pool["references"]) == 2
            worker.open = True
            worker.let(1)
            seen = [step["step"] for step in frame["steps"]]
            while (frame := await watcher.frame())["requests"]:
                seen += [step["step"] for step in frame["steps"]]
            seen += [step["step"] for step in frame["steps"]]
            assert seen == sorted(set(seen))
            assert frame["pool"]["states"].count("c") > 0


async def test_rates_and_hits_can_be_computed(autojump_clock: trio.testing.MockClock) -> None:
    """The sums over the steps are the counts of the answers; times to the first and between tokens are there."""
    async with open_stub(StubRunner(), spec_method="ngram") as engine:
        app = create_app(engine, Config())
        async with watching(app) as watcher:
            await watcher.frame()
            for _ in range(2):
                await complete(app)
            frame = await watcher.frame()
        steps = frame["steps"]
        assert sum(step["generated_tokens"] for step in steps) == 16
        assert sum(step["prefill_tokens"] for step in steps) == 2 * len(TEXT) - 48
        assert sum(step["queried_tokens"] for step in steps) == 2 * len(TEXT)
        assert sum(step["hit_tokens"] for step in steps) == 48
        assert frame["first_token"]["count"] == 2
        assert frame["first_token"]["p50_ms"] <= frame["first_token"]["p95_ms"]
        assert frame["inter_token"]["count"] > 0
        assert frame["token_budget"] == 512


async def test_nothing_is_built_while_nobody_watches() -> None:
    """Without a watcher no state is built and no report is listened to, before one came and after it left."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        before = list(engine._metrics.step_watchers)
        await complete(app)
        assert engine.live.num_built == 0
        async with watching(app) as watcher:
            await watcher.frame()
            assert len(engine._metrics.step_watchers) == len(before) + 1
        built = engine.live.num_built
        assert built >= 1
        await complete(app)
        assert engine.live.num_built == built
        assert engine._metrics.step_watchers == before
        assert engine.live._latest is None


async def test_states_come_at_a_bounded_rate(autojump_clock: trio.testing.MockClock) -> None:
    """At most five a second while there is work, one a second without; all watchers share them."""
    worker = GatedWorker()
    async with open_stub(StubRunner(), worker=worker) as engine:
        app = create_app(engine, Config())
        async with trio.open_nursery() as nursery, watching(app) as watcher, watching(app) as other:
            began_s = trio.current_time()
            for _ in range(5):
                assert await watcher.frame() == await other.frame()
            assert trio.current_time() - began_s >= 4
            nursery.start_soon(complete, app)
            await trio.testing.wait_all_tasks_blocked()
            await watcher.frame()
            built, began_s = engine.live.num_built, trio.current_time()
            for _ in range(20):
                await watcher.frame()
                await other.frame()
            passed_s = trio.current_time() - began_s
            assert 3.8 <= passed_s <= 5
            assert engine.live.num_built - built <= 5 * passed_s + 1
            worker.open = True
            worker.let(1)


async def test_a_state_that_takes_long_is_built_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building takes at most a fiftieth of the event loop."""
    async with open_stub(StubRunner()) as engine:
        ticks = iter([0.0, 1.0])
        monkeypatch.setattr(live.time, "perf_counter", lambda: next(ticks))
        with engine.live.watch():
            snapshot = engine.live.snapshot()
            assert snapshot.next_at_s == snapshot.at_s + 50
            assert engine.live.snapshot() is snapshot


async def test_a_slow_reader_gets_the_newest_state(autojump_clock: trio.testing.MockClock) -> None:
    """What happens while a client does not read is not kept for it: its next state is the present one."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        async with watching(app) as watcher:
            await watcher.frame()
            await trio.sleep(3)  # The next state is written and not read.
            built = engine.live.num_built
            for _ in range(10):
                await complete(app)
                await trio.sleep(3)
            assert engine.live.num_built == built
            await watcher.frame()
            last = await watcher.frame()
            assert last["steps"][-1]["step"] == engine.trace[-1].stats.step


async def test_watchers_are_limited() -> None:
    """The ninth watcher is refused; when one leaves, another may come."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        async with trio.open_nursery() as nursery:
            calls = [exchange(app, "GET", "/v1/engine/live") for _ in range(live.MAX_WATCHERS)]
            for call in calls:
                nursery.start_soon(call.run)
                await call.chunks.receive()
            refused = await ask(app, "GET", "/v1/engine/live")
            assert refused.status == 503
            assert "8 clients watch the engine already" in refused.json()["error"]["message"]
            calls[0].disconnect()
            await trio.testing.wait_all_tasks_blocked()
            async with watching(app) as watcher:
                await watcher.frame()
            nursery.cancel_scope.cancel()


async def test_ids_of_others_are_not_told(autojump_clock: trio.testing.MockClock) -> None:
    """With keys, a key sees the ids of its own requests and numbers for the others; without keys, nobody sees ids."""
    for config, expected in (
        (Config(auth=AuthConfig(api_keys=KEYS)), {KEYS[0]: ["cmpl-mine", None], KEYS[1]: [None, "cmpl-theirs"]}),
        (Config(), {"none": [None, None]}),
    ):
        worker = GatedWorker()
        async with open_stub(StubRunner(), worker=worker) as engine:
            app = create_app(engine, config)
            if config.auth.api_keys:
                assert (await ask(app, "GET", "/v1/engine/live")).status == 401
            async with trio.open_nursery() as nursery:
                for key, name in zip(KEYS, ("mine", "theirs"), strict=True):
                    ask_one = {"prompt": TEXT, "max_tokens": 8, "request_id": name}
                    call = exchange(app, "POST", "/v1/completions", json.dumps(ask_one).encode(), headers(key))
                    nursery.start_soon(call.run)
                    await trio.testing.wait_all_tasks_blocked()
                worker.let(2)
                for key, ids in expected.items():
                    async with watching(app, headers=headers(key)) as watcher:
                        frame = await watcher.frame()
                        assert [request["id"] for request in frame["requests"]] == ids
                        text = json.dumps(frame)
                        assert ("theirs" in text, "mine" in text) == ("cmpl-theirs" in ids, "cmpl-mine" in ids)
                nursery.cancel_scope.cancel()


async def test_the_stream_ends_with_the_server(autojump_clock: trio.testing.MockClock) -> None:
    """A shutdown does not wait for those who watch."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        async with watching(app) as watcher:
            await watcher.frame()
            engine.drain()
            assert await watcher.call.body() == b"data: [DONE]\n\n"


async def test_a_large_pool_is_shown_in_cells() -> None:
    """A cell stands for as many blocks as needed, and shows the busiest of them."""
    total = 3 * live.MAX_CELLS - 5
    references, owners, cached = [0] * (total + 1), [0] * (total + 1), [False] * (total + 1)
    references[4], owners[4], cached[5], references[8], owners[8] = 1, 7, True, 2, 9
    cached[11] = True
    pool = live._cells(PoolMap(tuple(owners), tuple(references), tuple(cached), {}))
    assert (pool.total_blocks, pool.blocks_per_cell, len(pool.states)) == (total, 3, live.MAX_CELLS - 1)
    assert pool.states[:5] == "fuscf"
    assert pool.owners[:4] == (0, 7, 9, 0)
    assert pool.references[:4] == (0, 1, 2, 0)


# --- records ---------------------------------------------------------------------------------------------------------


def files_of(directory: Path) -> list[Path]:
    """Return the files of a record, the oldest first."""
    return sorted(directory.glob("*.record"))


async def record(app: ServerApp, on: bool, key: str | None = None, **options: Any) -> Any:
    """Start or stop recording."""
    given = headers(key) if key else {}
    return await ask(app, "POST", "/v1/engine/record", {"recording": on}, headers=given, **options)


async def test_recording_stops_and_goes_on_in_a_new_file(tmp_path: Path) -> None:
    """What is served meanwhile is in no file and is not counted as dropped; both files replay exactly."""
    async with open_stub(StubRunner(), record=str(tmp_path)) as engine:
        app = create_app(engine, Config())
        await complete(app)
        assert (await record(app, False)).json() == {"recording": False}
        assert engine.recording is False
        for _ in range(3):
            await complete(app)
        assert (await record(app, True)).json() == {"recording": True}
        await complete(app)
        await complete(app)
        metrics = (await ask(app, "GET", "/metrics")).body.decode()
    assert 'trio_llm:record_dropped_calls_total{engine="0",model_name="models/stub"} 0.0' in metrics
    first, second = files_of(tmp_path)
    steps = [[moment.step for moment in Replay.open(path).walk()] for path in (first, second)]
    assert steps[0] and steps[1]
    assert max(steps[0]) < min(steps[1]) - 2 * 8


async def test_recording_needs_a_directory() -> None:
    """Without --record, the answer says what to do, and the state says so too."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        refused = await record(app, True)
        assert refused.status == 409
        assert "--record DIR" in refused.json()["error"]["message"]
        async with watching(app) as watcher:
            assert (await watcher.frame())["recording"] is None


async def test_only_operators_record(tmp_path: Path) -> None:
    """With administrators' keys, only they; with keys, every key; without, this machine."""
    remote: dict[str, Any] = {"client": ("192.0.2.7", 5)}
    async with open_stub(StubRunner(), record=str(tmp_path)) as engine:
        keyed = AuthConfig(api_keys=KEYS)
        app = create_app(engine, Config(auth=attrs.evolve(keyed, admin_api_keys=(ADMIN,))))
        assert (await record(app, False)).status == 401
        assert (await record(app, False, KEYS[0])).status == 403
        assert engine.recording is True
        assert (await record(app, False, ADMIN)).status == 200
        app = create_app(engine, Config(auth=keyed))
        assert (await record(app, True, KEYS[0], **remote)).status == 200
        app = create_app(engine, Config())
        assert (await record(app, False, **remote)).status == 403
        assert (await record(app, False)).status == 200
