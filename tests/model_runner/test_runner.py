from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.model_runner.conftest import NUM_GENERATED, Golden
from tests.model_runner.drive import Params, least_blocks, run
from trio_llm.messages import CORRUPTED, Admission, StepPlan
from trio_llm.model.runner import Runner
from trio_llm.model.sampling.sampler import FAILURES, NOT_FINITE
from trio_llm.params import PoolingParams, SamplingParams

NAME = "qwen3"
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_GENERATED, ignore_eos=True)
VARIED = [
    SamplingParams(seed=1, max_tokens=12, ignore_eos=True, logprobs=2),
    SamplingParams(seed=2, max_tokens=12, top_p=0.8, frequency_penalty=0.7, repetition_penalty=1.3),
    SamplingParams(seed=3, max_tokens=12, top_k=5, presence_penalty=1.5, prompt_logprobs=1),
    SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.5, bad_words_token_ids=((5,), (9, 10))),
    SamplingParams(seed=4, max_tokens=12, min_p=0.05, min_tokens=6, logit_bias={2: 8.0}),
    PoolingParams(),
    SamplingParams(seed=5, max_tokens=12, allowed_token_ids=tuple(range(40))),
    PoolingParams(pooling="last", normalize=False),
]


@pytest.fixture
def expected(golden: Callable[[str], Golden]) -> Golden:
    """Return the family that stands for all where families make no difference."""
    return golden(NAME)


@pytest.fixture
def runner(runner_of: Callable[..., Runner]) -> Runner:
    """Return that family's runner."""
    return runner_of(NAME)


@pytest.fixture
def varied(expected: Golden) -> list[tuple[list[int], Params]]:
    """Sixteen requests that want sixteen things."""
    return list(zip(expected.prompts, VARIED * 2, strict=True))


@torch.inference_mode()
def oracle_logprobs(golden: Golden, tokens: list[int]) -> np.ndarray:
    """Return [tokens, V] from transformers."""
    return golden.oracle(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()


@pytest.mark.parametrize(
    "settings", [{"chunk": 7}, {"chunk": 1}, {"batch_size": 1}, {"batch_size": 5, "caching": False}]
)
def test_a_seed_gives_the_same_tokens_in_any_company(
    runner: Runner, varied: list[tuple[list[int], Params]], settings: dict[str, Any]
) -> None:
    """Sampled tokens depend on the request alone, not on chunks, batch mates or the prefix cache."""
    assert run(runner, varied, **settings).token_ids == run(runner, varied).token_ids


def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(
    runner: Runner, varied: list[tuple[list[int], Params]]
) -> None:
    """Seeds, penalties, min_tokens and bad words count on from where the sequence was thrown out."""
    outcome = run(runner, varied, num_blocks=least_blocks(runner, 63, chunk=2048) + 4)
    assert outcome.num_preempted > 0
    assert outcome.token_ids == run(runner, varied).token_ids


def test_a_step_may_be_run_again(runner: Runner, varied: list[tuple[list[int], Params]]) -> None:
    """A step whose rows are run again in halves leaves everything as one run of it does."""
    again = run(runner, varied, chunk=7, repeat_steps=True)
    once = run(runner, varied, chunk=7)
    assert again.token_ids == once.token_ids
    for one, other in zip(again.answers, once.answers, strict=True):
        assert [entry.logprob for entry in one.logprobs] == pytest.approx([e.logprob for e in other.logprobs], abs=1e-4)
        assert (one.vector is None) == (other.vector is None)
        assert one.vector is None or one.vector == pytest.approx(other.vector, abs=1e-5)
        assert len(one.prompt_logprobs or ()) == len(other.prompt_logprobs or ())


@pytest.mark.parametrize("chunk", [1, 7, 0])
def test_logprobs_are_those_of_transformers(runner: Runner, expected: Golden, chunk: int) -> None:
    """Prompt and output logprobs, ranks and likeliest tokens agree with the oracle, over any chunks."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    outcome = run(runner, [(prompt, params) for prompt in expected.prompts], chunk=chunk)
    for prompt, answer in zip(expected.prompts, outcome.answers, strict=True):
        reference = oracle_logprobs(expected, prompt + answer.token_ids)
        assert answer.prompt_logprobs is not None
        assert answer.prompt_logprobs[0] is None
        tokens = prompt + answer.token_ids
        entries = [*answer.prompt_logprobs[1:], *answer.logprobs]
        assert [entry.token_id for entry in entries if entry] == tokens[1:]
        for position, entry in enumerate(entries):
            assert entry is not None
            row = reference[position]
            assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
            assert abs(entry.rank - 1 - int((row > row[entry.token_id]).sum())) <= 1
            best = np.sort(row)[::-1][: len(entry.top)]
            assert [logprob for _, logprob in entry.top] == pytest.approx(best, abs=1e-4)
            assert len(entry.top) == (2 if position < len(prompt) - 1 else 3)


def test_a_poisonous_prompt_fails_alone(runner: Runner, expected: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN out of the model fails the requests it concerns, by name; all others get what they would have got."""
    prompts = [[token for token in prompt if token != 127] for prompt in expected.prompts[:6]]
    requests: list[tuple[list[int], Params]] = [(prompt, GREEDY) for prompt in prompts]
    healthy = run(runner, requests, caching=False)
    assert not any(127 in token_ids for token_ids in healthy.token_ids)
    forward = runner._model.forward

    def poisoned(batch: Any, kv: Any) -> torch.Tensor:
        hidden = forward(batch, kv)
        hidden[batch.token_ids == 127] = torch.nan
        return hidden

    monkeypatch.setattr(runner._model, "forward", poisoned)
    scored = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1)
    poison: list[tuple[list[int], Params]] = [([5, 127], GREEDY), ([127, 5], PoolingParams()), ([127, 5], scored)]
    outcome = run(runner, [*poison, *requests], caching=False)
    assert outcome.token_ids[3:] == healthy.token_ids
    assert [str(answer.error) for answer in outcome.answers[:3]] == [
        FAILURES[NOT_FINITE],
        CORRUPTED,
        FAILURES[NOT_FINITE],
    ]
    assert all(answer.error is None for answer in outcome.answers[3:])


@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "gemma4-e2b"])
def test_int8_keys_and_values_move_logprobs_little(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner], name: str
) -> None:
    """With INT8 KV the output is the same with prefix cache, chunks and preemption, and near the exact one."""
    expected = golden(name)
    runner = runner_of(name, kv_quantization=True)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompts = expected.prompts[:8]
    scored = run(runner, [(prompt, params) for prompt in prompts], chunk=7)
    for prompt, answer in zip(prompts, scored.answers, strict=True):
        reference = oracle_logprobs(expected, prompt)
        entries = [entry for entry in answer.prompt_logprobs or () if entry]
        assert [e.logprob for e in entries] == pytest.approx(
            [float(reference[i, e.token_id]) for i, e in enumerate(entries)], abs=0.25
        )
    requests: list[tuple[list[int], Params]] = [(prompt, GREEDY) for prompt in expected.prompts]
    plain = run(runner, requests, caching=False)
    assert run(runner, requests, caching=True, chunk=7).token_ids == plain.token_ids
    small = run(runner, requests, caching=False, chunk=7, num_blocks=least_blocks(runner, 61, chunk=7) + 8)
    assert small.num_preempted > 0
    assert small.token_ids == plain.token_ids
    assert runner._kv.nbytes < 0.6 * runner_of(name)._kv.nbytes


def test_rows_are_given_back(runner_of: Callable[..., Runner]) -> None:
    """A dropped sequence's row, with all it knew, goes to the next one; dropping what is unknown does no harm."""
    runner = runner_of(NAME, max_batch_size=1)
    for request_id in range(3):
        params = SamplingParams(temperature=0, repetition_penalty=1.5) if request_id == 0 else GREEDY
        admitted = (Admission(request_id, (7, 8, 9), 3, params),)
        new_blocks = (((0, (request_id + 1,)),),)
        plan = StepPlan(
            request_id, (request_id - 1, 99), admitted, (request_id,), (0,), (3,), (7, 8, 9), (True,), new_blocks
        )
        (token_ids,) = runner.step(plan).token_ids
        assert len(token_ids) == 1
    with pytest.raises(AssertionError, match="max_batch_size"):
        runner.step(StepPlan(3, (), (Admission(3, (7,), 1, GREEDY),), (3,), (0,), (1,), (7,), (True,), ((),)))


@pytest.mark.parametrize(("name", "per_token"), [("mixtral", 3 * 2), ("gemma4-26b", 6 * 3), ("qwen3", None)])
def test_steps_tell_what_experts_were_given(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner], name: str, per_token: int | None
) -> None:
    """Every step reports its own tokens per expert, layers and chosen experts added up; dense models report none."""
    runner = runner_of(name)
    prompt = tuple(golden(name).prompts[0])
    for step, count in enumerate((len(prompt), 5)):
        blocks = (((0, tuple(range(1, 13))),) * len(runner.info.kv_groups),)
        admitted = (Admission(step, prompt[:count], count, GREEDY),)
        dropped = tuple(runner._rows._row_of)
        plan = StepPlan(step, dropped, admitted, (step,), (0,), (count,), prompt[:count], (True,), blocks)
        tokens = runner.step(plan).expert_tokens
        assert (tokens and sum(tokens)) == (per_token and per_token * count)
