"""Real checkpoints behind the engine: with two steps in flight as with one, token for token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio

from tests.engine.fakes import FakeTokenizer
from tests.model_runner.conftest import Golden
from tests.model_runner.test_runner import NAME, VARIED
from trio_llm import Config, open_engine
from trio_llm.config import EngineConfig
from trio_llm.demo import demo_model_path
from trio_llm.engine import Engine
from trio_llm.engine.supervisor import run_engine
from trio_llm.grammar import GrammarCompiler, json_schema, regex
from trio_llm.messages import StepPlan, StepResult
from trio_llm.model.runner import Runner
from trio_llm.model_info import ModelInfo
from trio_llm.params import PoolingParams, SamplingParams, Submission

Params = SamplingParams | PoolingParams
WHOLE = {"max_batch_size": 16}
CHUNKS = {"max_batch_size": 5, "long_prefill_token_threshold": 7}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}


@attrs.define
class Kept:
    """A runner that tests share; it counts the tokens that plans did not know."""

    runner: Runner
    num_unknown: int = 0

    def __attrs_post_init__(self) -> None:
        self.close()  # the rows of whoever used it before

    @property
    def info(self) -> ModelInfo:
        return self.runner.info

    @property
    def ranks(self) -> None:
        return None

    def launch(self, plan: StepPlan, begun: Callable[[], None]) -> Callable[[], StepResult]:
        self.num_unknown += plan.token_ids.count(-1)
        return self.runner.launch(plan, begun)

    def close(self) -> None:
        for request_id in list(self.runner._rows._row_of):
            self.runner._drop(request_id)


class Letters(FakeTokenizer):
    """A letter per token, for a vocabulary of any size."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(0x4E00 + token_id) for token_id in token_ids)


async def answers(engine: Engine, requests: list[tuple[list[int], Params]]) -> list[Any]:
    """Ask for everything at once; return what each client gets, floats rounded to what batches may change."""
    heard: list[Any] = [None] * len(requests)

    async def ask(at: int, prompt: list[int], params: Params) -> None:
        if isinstance(params, PoolingParams):
            vector, _ = await engine.embed(Submission(prompt, params))
            heard[at] = [pytest.approx(value, abs=1e-4) for value in vector]
            return
        async with engine.open_stream(Submission(prompt, params)) as stream:
            answer = await stream.collect()
        logprobs = [entry.token_id for entry in answer.logprobs or ()]
        scored = None if stream.prompt_logprobs is None else [e and e.token_id for e in stream.prompt_logprobs]
        heard[at] = (answer.token_ids, answer.text, answer.finish_reason, answer.stop_reason, logprobs, scored)

    async with trio.open_nursery() as nursery:
        for at, (prompt, params) in enumerate(requests):
            nursery.start_soon(ask, at, prompt, params)
    return heard


@pytest.mark.parametrize(
    ("name", "settings"), [(NAME, WHOLE), (NAME, CHUNKS), ("gemma4-e2b", CHUNKS), ("mixtral", WHOLE)], ids=str
)
async def test_answers_are_those_of_one_step_at_a_time(
    runner_of: Callable[..., Runner], golden: Callable[[str], Golden], name: str, settings: dict[str, Any]
) -> None:
    """Greedy and seeded, with penalties, bad words, biases, logprobs, scored prompts, vectors and stop strings."""
    requests: list[tuple[list[int], Params]] = list(zip(golden(name).prompts, VARIED * 2, strict=True))
    requests += [(prompt, SamplingParams(temperature=0, max_tokens=20)) for prompt in golden(name).prompts]
    heard: list[list[Any]] = []
    unknown: list[int] = []
    for ahead in (False, True):
        kept = Kept(runner_of(name))
        config = EngineConfig(async_scheduling=ahead, max_waiting_batches=20, **settings)
        tokenizer: Any = Letters()
        async with run_engine(config, lambda kept=kept: kept, tokenizer) as engine:
            first = await answers(engine, requests)
            # What follows the fourth token of each answer, cut there by a string, an id, or both.
            stops = [(row[0], row[1]) if isinstance(row, tuple) and len(row[1]) > 6 else None for row in first]
            again = [
                (prompt, attrs.evolve(params, stop=(found[1][4:6],), stop_token_ids=found[0][5:6]))
                for (prompt, params), found in zip(requests, stops, strict=True)
                if found is not None and isinstance(params, SamplingParams)
            ]
            heard.append([*first, *await answers(engine, again)])
            unknown.append(kept.num_unknown)
    assert heard[1] == heard[0]
    assert unknown[0] == 0
    assert unknown[1] > 200


async def test_a_grammar_is_kept_to_although_steps_are_ahead() -> None:
    """What may come next depends on the token in flight: the launch waits for it, and the answer is the same."""
    heard: list[list[Any]] = []
    for ahead in (False, True):
        config = Config(engine=EngineConfig(model=str(demo_model_path()), num_kv_blocks=128, async_scheduling=ahead))
        async with open_engine(config) as engine:
            eos = list(engine.info.eos_token_ids)
            compiler = GrammarCompiler(engine.tokenizer.json, vocab_size=engine.info.vocab_size, eos_token_ids=eos)
            sources = [
                json_schema(SCHEMA, param="p", any_whitespace=False),
                regex("[A-Z][a-z]{2,6} is [0-9]{3}", param="p"),
            ]
            prompt = engine.tokenizer.encode("The capital of Japan is")
            requests: list[tuple[list[int], Params]] = [
                (prompt, SamplingParams(temperature=temperature, seed=5, max_tokens=40, grammar=compiler.compile(one)))
                for one in sources
                for temperature in (0.0, 1.0)
            ]
            requests += [(prompt, SamplingParams(temperature=0, max_tokens=40))]
            heard.append(await answers(engine, requests))
    assert heard[1] == heard[0]
    assert "stop" in [answer[2] for answer in heard[0][:4]]
