"""A replay is, at every step, what the engine was."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import attrs
import pytest

from tests.core.loop import FULL, HYBRID, SLIDING, TWO_SIZES, VOCAB, Loop
from tests.core.test_oracle import _submit
from tests.replay.tape import Tape, setup_of
from trio_llm.core.prompt_lookup import LookupSizes
from trio_llm.core.running_step import RunningStep
from trio_llm.core.sequence import Sequence
from trio_llm.core.sequence_blocks import SequenceBlocks
from trio_llm.core.speculation import Speculation
from trio_llm.replay import Replay, state

LOOKUP = Speculation(3, LookupSizes(1, 3))
DRAFT_MODEL = Speculation(3, None)


def often_right(token: int) -> int:
    """Return what a draft model guesses where this token is right."""
    return token if token % 3 else (token + 1) % VOCAB


def simulate(seed: int, loop: Loop, num_requests: int) -> None:
    """Drive a loop with random traffic, aborts and failures until it is drained."""
    rng = random.Random(seed)

    def disturb() -> None:
        if loop.clients and rng.random() < 0.1:
            loop.abort(rng.randrange(1, len(loop.clients) + 1))

    while len(loop.clients) < num_requests or loop.busy:
        for _ in range(min(rng.randrange(3), num_requests - len(loop.clients))):
            _submit(rng, loop, 30)
        disturb()
        failed = [rng.randrange(1, len(loop.clients) + 1)] if loop.clients and rng.random() < 0.05 else []
        loop.step(failed, in_flight=disturb)
    loop.check_drained()


def recorded(
    seed: int = 1,
    groups: tuple = FULL,
    *,
    tokens: bool = False,
    num_requests: int = 14,
    policy: str = "fcfs",
    speculation: Speculation | None = None,
    prompt_tokens: Callable[[], int | None] = lambda: None,
    **options: object,
) -> Tape:
    """Return the tape of a random run in a pool that is too small."""
    num_blocks = {FULL: 12, SLIDING: 9, HYBRID: 20, TWO_SIZES: 20}[groups]
    loop = Loop(
        groups,
        num_blocks=num_blocks,
        policy=policy,
        threshold=5,
        speculation=speculation,
        prompt_tokens=prompt_tokens,
        **options,
    )
    tape = Tape(loop, setup_of(loop, policy=policy, speculation=speculation), tokens=tokens)
    simulate(seed, loop, num_requests)
    return tape


CASES = [
    (groups, kind, tokens)
    for groups, kind, tokens in product(
        [FULL, SLIDING, HYBRID, TWO_SIZES], ["one step", "two steps", "lookup", "drafts", "pace"], [False, True]
    )
]


@pytest.mark.parametrize(("groups", "kind", "tokens"), CASES)
def test_every_step_is_the_engines(tmp_path: Path, groups: tuple, kind: str, tokens: bool) -> None:
    """Queues, sequences, tables, pool and steps in flight are the same, forward, backward and at random."""
    options = {
        "one step": {"policy": "priority"},
        "two steps": {"depth": 2, "late": True},
        "lookup": {"speculation": LOOKUP},
        "drafts": {"speculation": DRAFT_MODEL, "guess": often_right},
        "pace": {"prompt_tokens": partial(random.Random(1).choice, [None, 1, 2, 7, 100])},
    }[kind]
    tape = recorded(groups=groups, tokens=tokens, **options)
    replay = Replay.open(tape.save(tmp_path / "run.record"))
    steps = [replay.step for _ in replay.walk() if replay.state() == tape.states[replay.step]]
    assert steps == list(tape.states)
    for step in reversed(steps[-8:-1]):
        assert replay.back().step == step
        assert replay.state() == tape.states[step]
    for step in random.Random(2).sample(steps, 5):
        assert replay.at(step).state() == tape.states[step]


def test_the_runs_are_under_pressure() -> None:
    """The runs above preempt, find prompts in the cache and accept drafts, or they would prove little."""
    stats = [
        stats
        for groups in (FULL, SLIDING, HYBRID, TWO_SIZES)
        for stats in recorded(groups=groups, num_requests=25).loop.stats
    ]
    stats += recorded(speculation=DRAFT_MODEL, guess=often_right).loop.stats
    assert sum(one.num_preempted for one in stats) > 10
    assert sum(one.blocks.hit_tokens for one in stats) > 40
    assert sum(sum(one.accepted) for one in stats) > 10


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("speculation", [None, LOOKUP])
def test_a_file_begins_anywhere(tmp_path: Path, depth: int, tokens: bool, speculation: Speculation | None) -> None:
    """A file that was begun in the middle of a run goes on from the state that it begins with."""
    tape = recorded(groups=HYBRID, tokens=tokens, depth=1 if speculation else depth, speculation=speculation)
    steps = list(tape.states)
    for begin in steps[2:-2:11]:
        replay = Replay.open(tape.save(tmp_path / "part.record", begin))
        assert replay.state() == tape.states[begin]
        after = [replay.step for _ in replay.walk() if replay.state() == tape.states[replay.step]]
        assert after == [step for step in steps if step > begin]


def test_a_state_covers_every_field_of_the_core() -> None:
    """A new field of a sequence, of its blocks or of a step in flight has to get a place in the state."""
    named = {"request_id", "submission", "key", "stop", "tokens", "status", "unsent", "drafts", "followers"}
    named.add("num_prompt_tokens")  # derived from the submission
    covered = {
        Sequence: {*state._SEQUENCE, *state._SEQUENCE_FLAGS, *named, "prompt_logprobs", "lookup"},
        SequenceBlocks: {*state._BLOCKS, "request_id", "chain", "tables", "live_from", "was_admitted"},
        RunningStep: {*state._STEP, "grant", "rows", "started", "accepted"},
    }
    assert {kind: {field.name for field in attrs.fields(kind)} for kind in covered} == covered
