"""Speculation behind the engine: the exact oracle drafts for itself, and the metrics say what that was worth."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.core.hash_model import HashRunner
from tests.engine.fakes import EOS, VOCAB_SIZE, HashStub, open_stub
from trio_llm.engine import Engine
from trio_llm.errors import RequestFailedError
from trio_llm.messages import StepPlan
from trio_llm.params import SamplingParams, Submission

MOST = 3


class DraftingStub(HashStub):
    """The oracle with a draft model that is right so often."""

    def __init__(self, right: float, **options: Any) -> None:
        super().__init__(**options)
        dice = random.Random(3)
        self.model = HashRunner(
            self.info.kv_groups, self.info.num_kv_blocks, VOCAB_SIZE, defaultdict(bytes), most=MOST,
            guess=lambda token: token if dice.random() < right else EOS - 1,
        )  # fmt: skip


PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


async def answer(engine: Engine, prompt: list[int]) -> tuple[int, ...]:
    """Return a request's tokens."""
    async with engine.open_stream(Submission(prompt, PARAMS)) as stream:
        return tuple([token async for delta in stream for token in delta.token_ids])


def series(engine: Engine) -> dict[str, float]:
    """Return what speculation exports, the places in a draft apart."""
    engine._metrics.catch_up()
    return {
        sample.name.removeprefix("vllm:spec_decode_") + sample.labels.get("position", ""): sample.value
        for family in text_string_to_metric_families(engine._metrics.render().decode())
        for sample in family.samples
        if "spec_decode" in sample.name
    }


async def test_answers_and_every_series() -> None:
    """Drafts change no answer; each of vLLM's series moves and they agree; without a method there is none of them."""
    prompts = [[at, 7, at + 1] for at in range(6)]
    async with open_stub(HashStub()) as engine:
        await answer(engine, prompts[0])
        assert not series(engine)
    stub = DraftingStub(0.7)
    async with open_stub(stub, spec_method="draft_model", max_draft_tokens=MOST) as engine:
        assert set(series(engine).values()) == {0}
        for prompt in prompts:
            assert await answer(engine, prompt) == stub.answer(prompt, PARAMS)
        found = series(engine)
    drafted, accepted = found["num_draft_tokens_total"], found["num_accepted_tokens_total"]
    by_place = [found[f"num_accepted_tokens_per_pos_total{place}"] for place in range(MOST)]
    assert len(found) == 3 + MOST
    assert drafted > found["num_drafts_total"] > drafted / MOST
    assert by_place[0] > by_place[1] > by_place[2] > 0
    assert sum(by_place) == accepted
    # Each step of an answer but the first and perhaps the last had a draft; it yields a token and what was right of it.
    assert found["num_drafts_total"] + accepted == pytest.approx(6 * 29, abs=6)


async def test_looked_up_tokens_change_no_answer() -> None:
    """The same with ngram, whose guesses come from the text; the oracle hardly ever follows them."""
    stub = HashStub()
    async with open_stub(stub, spec_method="ngram", prompt_lookup_min=1) as engine:
        for prompt in [[at, at + 1] * 8 for at in range(4)]:
            assert await answer(engine, prompt) == stub.answer(prompt, PARAMS)
        assert series(engine)["num_draft_tokens_total"] > 50


async def test_a_request_that_breaks_the_step_hurts_nobody_who_speculates() -> None:
    """Drafts go with the halves that a broken step is run in, and what these guess comes together again."""
    busy, broken = trio.Event(), 0

    def breaks(plan: StepPlan) -> None:
        nonlocal broken
        if sum(map(bool, plan.drafts)) == len(prompts):
            busy.set()
        if any(admission.num_prompt_tokens == 5 for admission in plan.admitted):
            broken += any(plan.drafts)
            raise ZeroDivisionError

    async def check(prompt: list[int]) -> None:
        assert await answer(engine, prompt) == stub.answer(prompt, PARAMS)

    stub = DraftingStub(1.0, hook=breaks)
    prompts = [[at, 7, at + 1] for at in range(3)]
    async with open_stub(stub, spec_method="draft_model", max_draft_tokens=MOST) as engine:
        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(check, prompt)
            await busy.wait()
            with pytest.raises(RequestFailedError):
                await answer(engine, [1] * 5)
    assert broken
