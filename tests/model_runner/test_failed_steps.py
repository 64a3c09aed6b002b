"""A launch that raises leaves nothing behind: repeated, it does what it would have done at first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import attrs
import pytest

from tests.model_runner.drive import Params, least_blocks, run
from tests.model_runner.faults import (
    InjectedError,
    Line,
    copy_of,
    difference,
    failing_at,
    first_places,
    lines_of,
    picture,
)
from tests.model_runner.test_load import CONFIG
from trio_llm import grammar
from trio_llm.config import EngineConfig
from trio_llm.core.speculation import Speculation
from trio_llm.demo import demo_model_path
from trio_llm.engine.recovery import Collect, launch_step
from trio_llm.messages import Admission, PoolingParams, SamplingParams, StepPlan, StepResult
from trio_llm.model.load import load_runner
from trio_llm.model.ops.logit_edits import TokenHistory
from trio_llm.model.runner import Runner

VOCAB, EOS = 1536, 2
DRAFTED = Speculation(3, None)
# Sixty distinct tokens, so that answers soon bring the 65th.
PROMPT = list(range(100, 160))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of random weights, no larger than a config.json, that fits the demo model's tokenizer."""
    path: Path = tmp_path_factory.mktemp("tiny")
    changes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "eos_token_id": EOS, "dtype": "float32"}
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return path


def load(directory: Path, **settings: object) -> Runner:
    """Load the model with a small pool, which is copied often."""
    options = {"load_format": "dummy", "block_size": 4, "num_kv_blocks": 100, "max_batch_size": 4, **settings}
    options |= {"enforce_eager": True}  # a tape holds addresses, which a copy of the runner would share
    return load_runner(EngineConfig(model=str(directory), **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def requests() -> list[tuple[list[int], Params]]:
    """Return requests that use every kind of state that a row has."""
    text = (demo_model_path() / "tokenizer.json").read_text()
    compiler = grammar.GrammarCompiler(text, vocab_size=VOCAB, eos_token_ids=[EOS])
    words = compiler.compile(grammar.regex("([a-z]+ )*", param="p"))
    hot = {"temperature": 1.5, "max_tokens": 14, "ignore_eos": True}
    wishes: list[Params] = [
        SamplingParams(**hot, seed=1, frequency_penalty=0.5, repetition_penalty=1.2, logprobs=2),
        SamplingParams(**hot, seed=2, grammar=words, presence_penalty=0.5),
        SamplingParams(**hot, seed=3, bad_words_token_ids=((7,), (8, 9)), logprobs=1, logprob_token_ids=(5, 6)),
        PoolingParams(),
        SamplingParams(**hot, seed=4, prompt_logprobs=1, min_tokens=3, logit_bias={5: 1.0}, top_p=0.9, min_p=0.01),
        SamplingParams(temperature=0, max_tokens=14, allowed_token_ids=tuple(range(700))),
        SamplingParams(**hot, seed=5, grammar=words, frequency_penalty=0.3, top_k=50),
    ]
    return [(PROMPT[i:] + PROMPT[:i], wish) for i, wish in enumerate(wishes)]


def plans_of(runner: Runner, requests: Sequence[tuple[list[int], Params]], **ways: object) -> list[StepPlan]:
    """Return the plans of a run; the runner is empty afterwards."""
    plans: list[StepPlan] = []
    run(runner, requests, batch_size=4, watch=lambda _, plan: plans.append(plan), **ways)  # type: ignore[arg-type]
    for request_id in list(runner._rows._row_of):
        runner._drop(request_id)
    return plans


def timeless(result: StepResult) -> StepResult:
    """Return a result but for how long it took."""
    return attrs.evolve(result, seconds=0.0)


def fail_everywhere(runner: Runner, plan: StepPlan, seen: set[Line], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a plan's launch raise at each line that it runs and that was not `seen`; repeat it, then compare.

    The runner itself stays as it is before the plan.
    """
    whole, traced = copy_of(runner, monkeypatch), copy_of(runner, monkeypatch)
    expected, after = timeless(whole.step(plan)), picture(whole)
    places = first_places(lines_of(partial(traced.launch, plan)))
    for line in places.keys() - seen:
        victim = copy_of(runner, monkeypatch)
        with pytest.raises(InjectedError):
            failing_at(places[line], partial(victim.launch, plan))
        assert timeless(victim.step(plan)) == expected, line
        assert difference(picture(victim), after) is None, line
    seen.update(places)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [False, True])
def test_a_launch_may_raise_at_any_line(
    directory: Path, requests: list[tuple[list[int], Params]], monkeypatch: pytest.MonkeyPatch, drafts: bool
) -> None:
    """The repeated step returns and leaves behind, to the bit, what a step without a fault does."""
    settings = {"spec_method": "draft_model", "spec_model": str(directory)} if drafts else {}
    runner = load(directory, **settings)
    few = least_blocks(runner, 76, 30) + 15
    plans = plans_of(runner, requests, chunk=30, num_blocks=few, speculation=DRAFTED if drafts else None)
    admissions = [admission for plan in plans for admission in plan.admitted]
    assert any(len(admission.token_ids) > admission.num_prompt_tokens for admission in admissions)  # preempted
    seen: set[Line] = set()
    for plan in plans:
        fail_everywhere(runner, plan, seen, monkeypatch)
        runner.step(plan)
    # Every file whose state a launch changes was among them.
    assert {Path(file).stem for file, _ in seen} >= {
        "grammar", "input_rows", "last_tokens", "logit_edits", "logprobs", "pooling", "prompt_logprobs",
        "runner", "sampler",
    }  # fmt: skip
    assert len(seen) > 550


@pytest.mark.slow
def test_a_step_that_raised_goes_on_in_halves(
    directory: Path, requests: list[tuple[list[int], Params]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the whole step raised, its halves sample what it would have sampled."""
    runner = load(directory)
    for plan in plans_of(runner, requests, chunk=30):
        whole, traced = copy_of(runner, monkeypatch), copy_of(runner, monkeypatch)
        expected = whole.step(plan).token_ids
        places = first_places(lines_of(partial(traced.launch, plan)))
        for line, at in list(places.items())[plan.step % 50 :: 50]:
            victim = copy_of(runner, monkeypatch)
            fails = iter([True])

            def launch(part: StepPlan, victim: Runner = victim, fails: Iterator[bool] = fails, at: int = at) -> Collect:
                return failing_at(at, partial(victim.launch, part)) if next(fails, False) else victim.launch(part)

            assert launch_step(plan, launch)().token_ids == expected, line
        runner.step(plan)


@pytest.mark.parametrize("num_prompt", [0, 1, 63, 64, 65, 200])
def test_a_history_counts_however_many_tokens_there_are(num_prompt: int) -> None:
    """Each distinct token of prompt and output has its own count, past 64, 128 and 256 of them."""
    prompt = tuple(range(num_prompt))
    history = TokenHistory(Admission(0, prompt, num_prompt, SamplingParams()))
    for token_id in range(300):
        history.append(token_id)
        history.append(5)
    expected = dict.fromkeys(range(300), 1) | {5: 301}
    assert dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True)) == expected
    assert history.output[-2:] == [299, 5]
