"""Keys of the prefix cache that came after a record's end: a state has them whole, so no two blocks share one."""

from __future__ import annotations

from itertools import product

from tests.core.loop import Loop
from tests.replay.tape import setup_of
from trio_llm.messages import StepResult
from trio_llm.model_info import KVGroup
from trio_llm.params import SamplingParams, Submission
from trio_llm.replay.machine import Machine, RecordedChain
from trio_llm.replay.state import KEY_BYTES

LENGTH = 1100


def test_keys_are_short_and_differ() -> None:
    """They fit a state, whatever the numbers; those that did so before are what they were."""
    numbers = [0, 7, 99, 999, 1000, 1001, 1010, 99_999, 100_000, 2**24]
    keys = [RecordedChain(one, b"", 1).block(index, 1)[0] for one, index in product(numbers, numbers)]
    assert max(map(len, keys)) == KEY_BYTES
    assert len(set(keys)) == len(keys)
    assert RecordedChain(999, b"", 1).block(1000, 1)[0] == b"999/1000"


def test_blocks_are_evicted_after_a_reset() -> None:
    """A state with a long sequence of a high number, whose keys are not in the record, goes on."""
    loop = Loop((KVGroup((0,), 1),), num_blocks=LENGTH + 10, budget=LENGTH, max_model_len=LENGTH + 5)
    machine = Machine(setup_of(loop), {}, tokens=False)
    step(machine, 1000)
    machine.scheduler.abort(1000)
    machine.scheduler.submit(1001, Submission((7,), SamplingParams(max_tokens=2)))
    step(machine)  # Releases the first one, whose blocks stay in the cache.
    before = machine.state()
    machine.reset(before)
    assert machine.state() == before
    step(machine, 1002)
    # All but the block that is still computed and the row's own are evicted.
    assert machine.state().pool.cached_blocks < 10


def step(machine: Machine, request_id: int | None = None) -> None:
    """Run one step, with a new request of LENGTH tokens if it has a number."""
    scheduler = machine.scheduler
    if request_id is not None:
        scheduler.submit(request_id, Submission((7,) * LENGTH, SamplingParams(max_tokens=5)))
    ask = scheduler.ask()
    assert ask is not None
    plan = scheduler.plan(machine.blocks.reserve(ask))
    assert plan is not None
    scheduler.commit(StepResult(plan.step, tuple([(5,) if samples else () for samples in plan.samples])))
    scheduler.take_ended()
