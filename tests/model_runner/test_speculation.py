"""Whole models with drafts: every output is, token for token, what it is without them.

No statistics are needed: the noise of sampling depends on (seed, position, token) alone, so random rows are as exact as
greedy ones.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest

from tests.model_runner.conftest import NUM_GENERATED, Golden
from tests.model_runner.drive import Answer, Outcome, Params, least_blocks, run
from trio_llm.core.prompt_lookup import LookupSizes
from trio_llm.core.speculation import Speculation
from trio_llm.model.runner import Runner
from trio_llm.params import PoolingParams, SamplingParams

Goldens = Callable[[str], Golden]
Runners = Callable[..., Runner]
FAMILIES = (
    "llama3-rope-gqa-tied",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "mistral",
    "mistral-window",
    "mixtral",
    "gemma4-e2b",
    "gemma4-26b",
    "gemma4-31b",
)
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_GENERATED, ignore_eos=True)
MOST = 3
LOOKUP = Speculation(MOST, LookupSizes(1, 3))
DRAFTS = Speculation(MOST, None)
# Parameters that change the logits, the noise, what is told and where it ends.
MIXED = (
    SamplingParams(temperature=1, seed=1, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1, seed=2, top_k=5, top_p=0.8, min_p=0.01, max_tokens=20, logprobs=2),
    SamplingParams(temperature=0.7, seed=3, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
    SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=20, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=0, bad_words_token_ids=((5,), (7, 8)), min_tokens=10, stop_token_ids=tuple(range(30))),
    SamplingParams(temperature=1, seed=4, logit_bias={9: 4.0, 10: -3.0}, allowed_token_ids=tuple(range(3, 90))),
    SamplingParams(temperature=1, seed=5, max_tokens=30, stop_token_ids=tuple(range(20, 40))),
    SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=2),
    SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
    PoolingParams(),
)


def drafted_by(runner_of: Runners, golden: Goldens, name: str, draft: str, **settings: object) -> Runner:
    """Return a runner of one family with another one, or itself, as its draft model."""
    directory = str(golden(draft).directory)
    return runner_of(name, spec_method="draft_model", spec_model=directory, max_draft_tokens=MOST, **settings)


def same(answer: Answer, expected: Answer) -> bool:
    """Say whether two requests were told the same; log-probabilities may differ by what float32 rounds."""
    told = [(entry.token_id, entry.rank) for entry in answer.logprobs]
    values = [entry.logprob for entry in answer.logprobs]
    return (
        answer.token_ids == expected.token_ids
        and told == [(entry.token_id, entry.rank) for entry in expected.logprobs]
        and values == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-4)
        and [[token_id for token_id, _ in entry.top] for entry in answer.logprobs]
        == [[token_id for token_id, _ in entry.top] for entry in expected.logprobs]
        and (answer.vector is None) == (expected.vector is None)
        and (answer.prompt_logprobs is None) == (expected.prompt_logprobs is None)
        and type(answer.error) is type(expected.error)
    )


def all_same(outcome: Outcome, expected: Outcome) -> bool:
    """Say whether all requests were told the same."""
    return all(same(*pair) for pair in zip(outcome.answers, expected.answers, strict=True))


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_the_same(golden: Goldens, runner_of: Runners, name: str, caching: bool) -> None:
    """Tokens looked up, or drafted by the model itself, which is always right: the output is transformers'."""
    expected = golden(name)
    requests = [(prompt, GREEDY) for prompt in expected.prompts]
    runner = drafted_by(runner_of, golden, name, name)
    plain = run(runner_of(name), requests, caching=caching, batch_size=4)
    looked_up = run(runner_of(name), requests, caching=caching, batch_size=4, speculation=LOOKUP)
    drafted = run(runner, requests, caching=caching, batch_size=4, speculation=DRAFTS)
    for outcome in (plain, looked_up, drafted):
        assert outcome.token_ids == expected.follow_all(outcome.token_ids)
        assert {len(token_ids) for token_ids in outcome.token_ids} == {NUM_GENERATED}
    assert looked_up.num_drafted > 0
    assert drafted.num_accepted == drafted.num_drafted > 0
    assert drafted.num_steps < plain.num_steps


@pytest.mark.parametrize(
    ("name", "draft"), [("qwen3", "llama3-rope-gqa-tied"), ("gemma4-e2b", "qwen3"), ("mixtral", "mistral-window")]
)
def test_a_draft_model_that_knows_nothing_does_no_harm(
    golden: Goldens, runner_of: Runners, name: str, draft: str
) -> None:
    """The drafts of another random model are nearly all wrong, whatever its layers; the output stays."""
    requests = [(prompt, params) for prompt, params in zip(golden(name).prompts, MIXED * 2, strict=False)]
    outcome = run(drafted_by(runner_of, golden, name, draft), requests, speculation=DRAFTS)
    assert all_same(outcome, run(runner_of(name), requests))
    assert outcome.num_drafted > 50
    assert outcome.num_accepted < 0.3 * outcome.num_drafted


@pytest.mark.parametrize("name", ["qwen3", "gemma4-26b"])
@pytest.mark.parametrize(
    "ways", [{}, {"chunk": 7}, {"repeat_steps": True}, {"batch_size": 1, "caching": False}, {"crowded": True}]
)
def test_every_parameter_goes_with_drafts(golden: Goldens, runner_of: Runners, name: str, ways: dict) -> None:
    """Penalties, bans, stops, noise and log-probabilities, however scheduled, are what they are without drafts."""
    requests: list[tuple[list[int], Params]] = [
        (prompt, params) for prompt, params in zip(golden(name).prompts, MIXED * 2, strict=False)
    ]
    expected = run(runner_of(name), requests)
    ways = dict(ways)
    if crowded := ways.pop("crowded", False):
        ways = {"num_blocks": least_blocks(runner_of(name), 75, chunk=16) + 8, "chunk": 16}
    for speculation, runner in ((LOOKUP, runner_of(name)), (DRAFTS, drafted_by(runner_of, golden, name, name))):
        outcome = run(runner, requests, speculation=speculation, **ways)
        assert all_same(outcome, expected)
        assert outcome.num_drafted > 0
        assert (outcome.num_preempted > 0) == crowded
        if speculation is DRAFTS:  # It draws with the noise that the model uses, too.
            assert outcome.num_accepted > 0.85 * outcome.num_drafted


def test_int8_keys_and_values_go_with_drafts(golden: Goldens, runner_of: Runners) -> None:
    """Quantised KV is written and overwritten as any other; the draft model's is quantised as well."""
    requests = [(prompt, params) for prompt, params in zip(golden("qwen3").prompts, MIXED * 2, strict=False)]
    runner = drafted_by(runner_of, golden, "qwen3", "qwen3", kv_quantization=True)
    outcome = run(runner, requests, speculation=DRAFTS)
    assert all_same(outcome, run(runner_of("qwen3", kv_quantization=True), requests))
    assert outcome.num_accepted > 0.85 * outcome.num_drafted


def test_a_prefix_hit_is_one_for_the_draft_model_too(golden: Goldens, runner_of: Runners) -> None:
    """The second time nearly the whole prompt is skipped by both models, and the drafts are right as before."""
    prompt = golden("qwen3").prompts[0]
    requests = [(prompt, attrs.evolve(GREEDY, seed=at)) for at in range(2)]
    runner = drafted_by(runner_of, golden, "qwen3", "qwen3")
    outcome = run(runner, requests, batch_size=1, speculation=DRAFTS)
    assert outcome.hit_tokens > len(prompt) - 8
    assert outcome.num_accepted == outcome.num_drafted > 0
    assert outcome.token_ids[0] == outcome.token_ids[1]
