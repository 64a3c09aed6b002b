"""Cancelling a request by its id: at whatever moment it comes, its reader learns how the request really ended."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.engine.fakes import StubRunner, continuation, open_stub
from tests.server.stub import GatedWorker
from trio_llm.core.scheduler import Scheduler
from trio_llm.engine import Engine, Stream
from trio_llm.errors import RequestFailedError
from trio_llm.messages import Commit, StepResult
from trio_llm.params import PoolingParams, SamplingParams, Submission

PROMPT = (1, 2, 3, 4, 5)


def greedy(max_tokens: int, **more: int) -> Submission:
    """Return a request."""
    return Submission(PROMPT, SamplingParams(temperature=0, max_tokens=max_tokens, **more))


@pytest.fixture
def cancelled_at_commit(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Engine, int]]:
    """Cancel the requests in this list at each commit: before what the step sampled is sent to readers."""
    requests: list[tuple[Engine, int]] = []
    commit = Scheduler.commit

    def cancelling(self: Scheduler, result: StepResult) -> Commit:
        done = commit(self, result)
        for engine, request_id in requests:
            engine.cancel(request_id)
        return done

    monkeypatch.setattr(Scheduler, "commit", cancelling)
    return requests


async def test_a_request_that_has_just_ended_keeps_its_end(cancelled_at_commit: list[tuple[Engine, int]]) -> None:
    """Its last token and its finish reason are still to be sent as it is cancelled."""
    async with open_stub() as engine:
        stream = engine.open_stream(greedy(1))
        cancelled_at_commit.append((engine, stream.request_id))
        delta = await stream.collect()
    assert (delta.finish_reason, delta.token_ids) == ("length", continuation(PROMPT, 1))


async def test_a_token_that_is_there_is_delivered(cancelled_at_commit: list[tuple[Engine, int]]) -> None:
    """What the step before the cancellation sampled is part of the answer."""
    async with open_stub() as engine:
        stream = engine.open_stream(greedy(50))
        cancelled_at_commit.append((engine, stream.request_id))
        delta = await stream.collect()
    assert (delta.finish_reason, delta.token_ids) == ("abort", continuation(PROMPT, 1))


async def test_a_cancelled_scoring_is_no_complete_one(nursery: trio.Nursery) -> None:
    """A request of no tokens ends for its length, and for that only if its prompt was computed."""
    worker = GatedWorker()
    async with open_stub(worker=worker, max_batch_size=1) as engine, engine.open_stream(greedy(5)):
        stream = engine.open_stream(greedy(0, prompt_logprobs=0))
        await wait_all_tasks_blocked()
        engine.cancel(stream.request_id)
        worker.open = True
        worker.let(1)
        delta = await stream.collect()
    assert (delta.finish_reason, stream.prompt_logprobs) == ("abort", None)


async def test_a_cancelled_embedding_is_an_error(nursery: trio.Nursery) -> None:
    """There is no vector."""
    worker, ids = GatedWorker(), list[int]()
    async with open_stub(worker=worker, max_batch_size=1) as engine, engine.open_stream(greedy(5)):

        async def embed() -> None:
            with pytest.raises(RequestFailedError, match="cancelled"):
                await engine.embed(Submission(PROMPT, PoolingParams()), submitted=ids.append)

        nursery.start_soon(embed)
        await wait_all_tasks_blocked()
        engine.cancel(ids[0])
        worker.open = True
        worker.let(1)
        await wait_all_tasks_blocked()


async def test_any_number_of_unread_answers_is_cancelled(nursery: trio.Nursery) -> None:
    """Those that have ended take no room in the inbox: the one that runs can still be aborted."""
    worker = GatedWorker()
    async with open_stub(StubRunner(), worker=worker, max_batch_size=1, max_waiting_batches=0) as engine:
        worker.open = True
        unread: list[Stream] = []
        for _ in range(8):
            unread.append(engine.open_stream(greedy(1)))
            await engine.wait_idle()
        worker.open = False
        running = engine.open_stream(greedy(400))
        await wait_all_tasks_blocked()
        for stream in unread:
            assert engine.cancel(stream.request_id)
        running.close()
        worker.open = True
        worker.let(1)
        await engine.wait_idle()
