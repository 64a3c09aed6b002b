"""Explaining and cancelling one's own requests, and what answers tell of times and progress."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.engine.test_speculation import DraftingStub
from tests.server.helpers import Answer, ask
from tests.server.stub import GatedWorker, StubRunner, continuation, open_stub
from trio_llm.config import AuthConfig, Config
from trio_llm.engine import history
from trio_llm.server.access.own_requests import OwnRequests
from trio_llm.server.app import ServerApp, create_app

KEYS = ("sk-0123456789abcdef", "sk-fedcba9876543210")
TEXT = "Once upon a time there was a king who had a daughter. "


def headers(key: int = 0) -> dict[str, str]:
    """Return the headers of one of two callers."""
    return {"content-type": "application/json", "authorization": f"Bearer {KEYS[key]}"}


@asynccontextmanager
async def served(worker: GatedWorker | None = None, **settings: Any) -> AsyncIterator[ServerApp]:
    """Serve two keys."""
    async with open_stub(StubRunner(), worker=worker, **settings) as engine:
        yield create_app(engine, Config(auth=AuthConfig(api_keys=KEYS)))


async def complete(app: ServerApp, prompt: str | list[int], *, key: int = 0, **fields: Any) -> Answer:
    """Ask for a completion."""
    body = {"prompt": prompt, "max_tokens": 4, "ignore_eos": True, **fields}
    return await ask(app, "POST", "/v1/completions", body, headers=headers(key))


async def explain(app: ServerApp, answer_id: str, key: int = 0) -> Answer:
    """Ask why a request was slow."""
    return await ask(app, "GET", f"/v1/requests/{answer_id}/explain", headers=headers(key))


async def cancel(app: ServerApp, answer_id: str, key: int = 0) -> Answer:
    """Cancel a request."""
    return await ask(app, "POST", f"/v1/requests/{answer_id}/cancel", headers=headers(key))


async def test_the_chunks_and_the_cached_prefix_are_told() -> None:
    """A prompt is computed after what is cached; where it leaves the cached one is told, with both texts."""
    async with served(max_num_batched_tokens=16) as app:
        await complete(app, TEXT)
        answer = (await complete(app, TEXT[:40] + "queen", request_id="mine")).json()
        assert answer["id"] == "cmpl-mine"
        (sample,) = (await explain(app, "cmpl-mine")).json()["samples"]
    assert (sample["state"], sample["reason"], sample["complete"]) == ("ended", "length", True)
    assert (sample["prompt_tokens"], sample["cached_tokens"], sample["needed_blocks"]) == (45, 32, 3)
    assert [(chunk["first"], chunk["tokens"]) for chunk in sample["chunks"]] == [(32, 13)]
    assert sample["difference"] == {"position": 40, "text": "queen", "cached_text": TEXT[40:48]}
    assert sample["decode_steps"] == 3
    assert sample["waits"] == sample["preempted_steps"] == []
    assert sample["total_ms"] >= sample["queue_ms"] >= 0


async def test_without_keys_the_cached_text_stays_hidden() -> None:
    """Where everybody shares one cache, a caller learns where its prompt differs, and nothing of another's."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        for prompt in (TEXT, TEXT[:40] + "queen"):
            body = {"prompt": prompt, "max_tokens": 2, "request_id": "mine"}
            await ask(app, "POST", "/v1/completions", body, headers={"content-type": "application/json"})
        (sample,) = (await ask(app, "GET", "/v1/requests/cmpl-mine/explain")).json()["samples"]
    assert sample["difference"] == {"position": 40, "text": "queen"}


async def test_a_wait_names_its_reason_and_its_neighbours() -> None:
    """Own requests are named by their answers' ids, those of other keys are one nameless entry."""
    worker = GatedWorker()
    async with served(worker, max_batch_size=2) as app, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: complete(app, TEXT, request_id="own", max_tokens=30))
        nursery.start_soon(lambda: complete(app, TEXT, key=1, request_id="foreign", max_tokens=30))
        await wait_all_tasks_blocked()
        worker.let(3)
        await wait_all_tasks_blocked()
        nursery.start_soon(lambda: complete(app, TEXT, request_id="late"))
        await wait_all_tasks_blocked()
        worker.let(5)
        await wait_all_tasks_blocked()
        (sample,) = (await explain(app, "cmpl-late")).json()["samples"]
        assert sample["state"] == "waiting"
        (wait,) = sample["waits"]
        assert wait["reason"] == "batch"
        assert wait["last_step"] > wait["first_step"]
        neighbours = {one["id"]: one for one in wait["neighbours"]}
        assert set(neighbours) == {"cmpl-own", None}
        assert neighbours[None]["requests"] == 1
        assert all(one["blocks"] == 4 and one["tokens"] == 1 for one in neighbours.values())
        worker.open = True
        worker.let(100)
    assert sample["queue_ms"] is None


@pytest.mark.parametrize("path", ["explain", "cancel"])
async def test_requests_of_others_are_unknown(path: str) -> None:
    """Another key's request, and one that never was, are the same 404."""
    method = "GET" if path == "explain" else "POST"
    async with served() as app:
        await complete(app, TEXT, request_id="mine")
        for key, name in ((1, "cmpl-mine"), (0, "cmpl-none"), (0, "x" * 300)):
            answer = await ask(app, method, f"/v1/requests/{name}/{path}", headers=headers(key))
            assert answer.status == 404
            assert "You have no request" in answer.json()["error"]["message"]
        assert (await ask(app, method, f"/v1/requests/cmpl-mine/{path}")).status == 401


async def test_every_api_s_ids_are_known() -> None:
    """The id of an answer of each endpoint explains it."""
    user = [{"role": "user", "content": "hi"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": ["hi", "ho"], "n": 2, "max_tokens": 2},
        "/v1/chat/completions": {"messages": user, "max_tokens": 2},
        "/v1/responses": {"input": "hi", "max_output_tokens": 2},
        "/v1/messages": {"messages": user, "max_tokens": 2},
    }
    async with served() as app:
        for path, body in bodies.items():
            answer = (await ask(app, "POST", path, body, headers=headers())).json()
            explained = (await explain(app, answer["id"])).json()
            assert explained["id"] == answer["id"]
            assert [one["index"] for one in explained["samples"]] == list(range(4 if "n" in body else 1))


async def test_a_cancelled_request_answers_what_there_is() -> None:
    """Its finish reason is "abort"; cancelling again does nothing."""
    worker = GatedWorker()
    answers: list[Answer] = []
    async with served(worker) as app, trio.open_nursery() as nursery:

        async def run() -> None:
            answers.append(await complete(app, "hello", request_id="mine", max_tokens=100))

        nursery.start_soon(run)
        await wait_all_tasks_blocked()
        worker.let(3)
        await wait_all_tasks_blocked()
        assert [(await cancel(app, "cmpl-mine")).json()["cancelled"] for _ in range(3)] == [True] * 3
        worker.open = True
        worker.let(1)
        await wait_all_tasks_blocked()
        assert (await cancel(app, "cmpl-mine")).json()["cancelled"] is False
        (sample,) = (await explain(app, "cmpl-mine")).json()["samples"]
        assert (sample["state"], sample["reason"]) == ("ended", "abort")
    (answer,) = answers
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "abort"
    assert 3 <= len(choice["text"]) <= 4
    assert continuation("hello", 4).startswith(choice["text"])


async def test_a_cancelled_answer_is_complete_in_no_form_of_api() -> None:
    """Each says so in its own words, also where the prompt that is to be echoed was not computed."""
    user, worker = [{"role": "user", "content": "hi"}], GatedWorker()
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "hi", "echo": True, "logprobs": 1},
        "/v1/responses": {"input": "hi"},
        "/v1/messages": {"messages": user, "max_tokens": 90},
    }
    found: dict[str, Any] = {}
    async with served(worker, max_batch_size=1, max_waiting_batches=8) as app, trio.open_nursery() as nursery:

        async def run(path: str, body: dict[str, Any]) -> None:
            answer = await ask(app, "POST", path, body, headers=headers())
            found[path] = (answer.status, answer.json())

        nursery.start_soon(complete, app, "first")
        await wait_all_tasks_blocked()
        for path, body in bodies.items():
            nursery.start_soon(run, path, body)
        while len(answers := [answer_id for _, answer_id in app.services.own_requests._samples]) < 4:
            await trio.lowlevel.checkpoint()
        for answer_id in answers[1:]:
            assert (await cancel(app, answer_id)).json()["cancelled"]
        worker.open = True
        worker.let(1)
    assert [status for status, _ in found.values()] == [200] * 3
    assert found["/v1/completions"][1]["choices"][0]["finish_reason"] == "abort"
    response = found["/v1/responses"][1]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", None)
    assert {item["status"] for item in response["output"]} == {"incomplete"}
    assert found["/v1/messages"][1]["stop_reason"] == "pause_turn"


async def test_a_live_request_is_remembered_whatever_follows() -> None:
    """Only those that have ended make room for newer ones, and an id that is used again is the newer request's."""
    own = OwnRequests(limit=2)
    own.add("a", "long", (0,))
    for number in range(1, 6):
        own.add("b", f"short {number}", (number,))
        own.end("b", f"short {number}", (number,))
    assert own.find("a", "long") == (0,)
    assert [own.find("b", f"short {number}") for number in (3, 4, 5)] == [(), (4,), (5,)]
    own.add("a", "long", (6,))
    own.end("a", "long", (0,))
    assert (own.find("a", "long"), own.name("a", 6), own.name("a", 0)) == ((6,), "long", None)
    assert len(own._ended) == 2


async def test_a_cancelled_stream_ends_in_good_order() -> None:
    """Its last chunk has the finish reason, and [DONE] follows; the other sample goes too."""
    worker = GatedWorker()
    answers: list[Answer] = []
    async with served(worker) as app, trio.open_nursery() as nursery:

        async def run() -> None:
            answers.append(await complete(app, "hello", request_id="mine", max_tokens=100, stream=True, n=2))

        nursery.start_soon(run)
        await wait_all_tasks_blocked()
        worker.let(4)
        await wait_all_tasks_blocked()
        assert (await cancel(app, "cmpl-mine")).json()["cancelled"]
        worker.open = True
        worker.let(1)
    *chunks, done = answers[0].events()
    assert done == "[DONE]"
    ends = {choice["index"]: choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]}
    assert ends == {0: "abort", 1: "abort"}


async def test_timings_are_llama_cpps() -> None:
    """Whole answers have them once, streams in each chunk; cached and computed tokens add up to the prompt."""
    names = "cache_n prompt_n prompt_ms prompt_per_token_ms prompt_per_second".split()
    names += "predicted_n predicted_ms predicted_per_token_ms predicted_per_second".split()
    async with served() as app:
        await complete(app, TEXT)
        whole = (await complete(app, TEXT, timings_per_token=True)).json()
        stream = (await complete(app, TEXT, timings_per_token=True, stream=True)).events()[:-1]
        assert "timings" not in (await complete(app, TEXT)).json()
    assert list(whole["timings"]) == names
    assert whole["timings"]["cache_n"] == 48
    assert whole["timings"]["cache_n"] + whole["timings"]["prompt_n"] == len(TEXT)
    assert whole["timings"]["predicted_n"] == 4
    assert all("timings" in chunk for chunk in stream)
    assert stream[-1]["timings"]["predicted_n"] == 4


async def test_timings_count_drafts() -> None:
    """With speculative decoding, drafts and those accepted are counted as in the explanation; else they are absent."""
    runner: Any = DraftingStub(0.5, num_kv_blocks=64)
    async with open_stub(runner, spec_method="draft_model", max_draft_tokens=3) as engine:
        app = create_app(engine, Config(auth=AuthConfig(api_keys=KEYS)))
        answer = (await complete(app, [1, 2, 3], max_tokens=20, timings_per_token=True, request_id="drafted")).json()
        (sample,) = (await explain(app, "cmpl-drafted")).json()["samples"]
    found = answer["timings"]
    assert (found["draft_n"], found["draft_n_accepted"]) == (sample["drafts"], sample["accepted"])
    assert found["draft_n"] > found["draft_n_accepted"] > 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("interval", [1, 3])
async def test_streams_report_the_progress_of_the_prompt(path: str, interval: int) -> None:
    """Before the first token there is a chunk per step, up to the whole prompt; the text is the same as without."""
    async with served(max_num_batched_tokens=16) as app:
        prompt = {"prompt": TEXT} if "chat" not in path else {"messages": [{"role": "user", "content": TEXT}]}
        body = {**prompt, "max_tokens": 4, "stream": True, "stream_interval": interval}
        plain = (await ask(app, "POST", path, {**body, "cache_salt": "a"}, headers=headers())).events()[:-1]
        told = (await ask(app, "POST", path, {**body, "return_progress": True}, headers=headers())).events()[:-1]
    progress = [chunk["prompt_progress"] for chunk in told if "prompt_progress" in chunk]
    total = progress[0]["total"]
    # The last part of the prompt gives the first token, too.
    assert [one["processed"] for one in progress] == list(range(16, total, 16))
    assert all((one["total"], one["cache"]) == (total, 0) and one["time_ms"] >= 0 for one in progress)
    rest = [chunk["choices"] for chunk in told if "prompt_progress" not in chunk]
    assert rest == [chunk["choices"] for chunk in plain]
    assert all("prompt_progress" in chunk for chunk in told[: len(progress)])


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old steps and old requests are forgotten; a request that began before what is remembered says so."""
    monkeypatch.setattr(history, "MAX_ROWS", 40)
    monkeypatch.setattr(history, "MAX_ENDED", 3)
    async with served() as app:
        app.services.own_requests.limit = 5
        for number in range(8):
            await complete(app, TEXT, request_id=str(number))
        engine = app.services.engine
        assert len(engine._history._ended) == 3
        assert engine._history._num_rows <= 40
        assert len(app.services.own_requests._samples) == len(app.services.own_requests._owners) == 5
        assert len(app.services.own_requests._ended) == 5
        assert (await explain(app, "cmpl-2")).status == 404
        assert (await explain(app, "cmpl-7")).status == 200
        await complete(app, "a", request_id="long", max_tokens=90)
        (sample,) = (await explain(app, "cmpl-long")).json()["samples"]
    assert not sample["complete"]
