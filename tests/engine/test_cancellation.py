"""Cancel a client at every one of its checkpoints: whatever it was doing, nothing of its request may stay behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.engine.fakes import StubRunner, continuation, open_stub
from trio_llm.engine import Engine, open_samples
from trio_llm.params import PoolingParams, SamplingParams, Submission

PROMPT = tuple(range(40))
MATE = (9, 8, 7)


@attrs.define(eq=False)
class CancelAt(trio.abc.Instrument):
    """Cancels a scope when its task is about to run for the n-th time."""

    scope: trio.CancelScope
    countdown: int
    task: trio.lowlevel.Task | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.countdown -= 1
            if self.countdown == 0:
                self.scope.cancel()


async def read_stream(engine: Engine) -> None:
    """Read a request to its end."""
    async with engine.open_stream(Submission(PROMPT, SamplingParams(temperature=0, max_tokens=10))) as stream:
        await stream.collect()


async def read_samples(engine: Engine) -> None:
    """Read three samples of a prompt to their ends."""
    async with open_samples(engine, Submission(PROMPT, SamplingParams(seed=1, n=3, max_tokens=6))) as streams:
        for stream in streams:
            await stream.collect()


async def stop_early(engine: Engine) -> None:
    """Leave a request while it runs."""
    async with engine.open_stream(Submission(PROMPT, SamplingParams(temperature=0, max_tokens=100))) as stream:
        await stream.__anext__()
        await trio.lowlevel.checkpoint()


async def embed(engine: Engine) -> None:
    """Wait for an embedding."""
    await engine.embed(Submission(PROMPT, PoolingParams()))


async def cancelled_at(client: Callable[[Engine], Awaitable[None]], checkpoint: int) -> bool:
    """Run a client that is cancelled at one of its checkpoints; return whether it came that far."""
    runner = StubRunner()
    scope = trio.CancelScope()
    instrument = CancelAt(scope, checkpoint)

    async def run(engine: Engine) -> None:
        instrument.task = trio.lowlevel.current_task()
        with scope:
            await client(engine)
        instrument.task = None

    async with open_stub(runner, max_num_batched_tokens=16) as engine:
        with trio.fail_after(5):
            mate = engine.open_stream(Submission(MATE, SamplingParams(temperature=0, max_tokens=30)))
            trio.lowlevel.add_instrument(instrument)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, engine)
            trio.lowlevel.remove_instrument(instrument)
            plans_before = len(runner.plans)
            assert (await mate.collect()).token_ids == continuation(MATE, 30)
            await engine.wait_idle()
        # The client's rows are in at most the one step that ran when it left.
        assert sum(len(plan.request_ids) > 1 for plan in runner.plans[plans_before:]) <= 1
        assert engine._mailboxes == {}
        assert engine._tickets.in_use == 0
        text = (await engine.render_metrics()).decode()
        assert 'vllm:kv_cache_usage_perc{engine="0",model_name="stub"} 0.0' in text
        assert 'vllm:num_requests_running{engine="0",model_name="stub"} 0.0' in text
    return instrument.countdown <= 0


@pytest.mark.parametrize("client", [read_stream, read_samples, stop_early, embed])
async def test_cancelling_anywhere_leaves_nothing_behind(
    client: Callable[[Engine], Awaitable[None]], mock_clock: MockClock
) -> None:
    """At whichever checkpoint a client is cancelled, its blocks and place come back and its mate is unharmed."""
    checkpoint = 1
    while await cancelled_at(client, checkpoint):
        checkpoint += 1
    assert checkpoint > 2
