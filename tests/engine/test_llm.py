from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.engine.fakes import FakeTokenizer, StubRunner, continuation, open_stub
from trio_llm import LLM, SamplingParams, StructuredOutputs, llm
from trio_llm.errors import CheckpointError, ConfigError, InvalidRequestError, RequestFailedError
from trio_llm.messages import StepPlan


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> StubRunner:
    """Stand in for the model of every LLM of the test."""
    runner = StubRunner()
    monkeypatch.setattr(
        llm, "open_engine", lambda config: open_stub(runner, max_batch_size=config.engine.max_batch_size)
    )
    return runner


@pytest.fixture
def model(runner: StubRunner) -> Iterator[LLM]:
    """An LLM round the stand-in."""
    with LLM(max_batch_size=4) as model:
        yield model


def greedy(**more: Any) -> SamplingParams:
    """Return parameters whose answer is known."""
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, **more})


@pytest.mark.parametrize("settings", [{"model": "/nope"}, {"model": "/nope", "tokenizer": "/neither"}])
def test_a_model_that_cannot_be_loaded_is_one_clear_error(settings: dict[str, Any]) -> None:
    """Its traceback shows the caller's line and LLM's own, nothing of threads, and no other exception."""
    with pytest.raises(CheckpointError, match="no such directory") as caught:
        LLM(**settings)
    assert len(traceback.extract_tb(caught.value.__traceback__)) == 2
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_prompts_as_text_and_as_tokens(model: LLM) -> None:
    """A text, a list, and token ids are all prompts; answers come in their order with text and tokens."""
    encode = FakeTokenizer().encode
    outputs = model.generate(["abc", {"prompt_token_ids": [7, 8]}], greedy(), use_tqdm=False)
    assert [output.prompt for output in outputs] == ["abc", None]
    assert [output.prompt_token_ids for output in outputs] == [tuple(encode("abc")), (7, 8)]
    for output in outputs:
        (sample,) = output.outputs
        assert sample.token_ids == continuation(output.prompt_token_ids, 6)
        assert sample.text == FakeTokenizer().decode(sample.token_ids)
        assert (sample.finish_reason, sample.stop_reason, sample.logprobs) == ("length", None, None)
    assert model.generate("abc", greedy(), use_tqdm=False)[0] == outputs[0]


def test_more_prompts_than_places(model: LLM) -> None:
    """Far more prompts than the engine admits at a time are all answered, in order."""
    prompts = [{"prompt_token_ids": [i % 60, i // 60]} for i in range(100)]
    outputs = model.generate(prompts, greedy(), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [continuation(o.prompt_token_ids, 6) for o in outputs]


def test_each_prompt_may_have_its_parameters(model: LLM) -> None:
    """A list of parameters goes with the prompts one by one; a list of another length is refused."""
    outputs = model.generate(["a", "b"], [greedy(max_tokens=2), greedy(max_tokens=5)], use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 5]
    with pytest.raises(InvalidRequestError, match="2 prompts, but 1"):
        model.generate(["a", "b"], [greedy()], use_tqdm=False)


def test_samples_and_logprobs(model: LLM) -> None:
    """N samples stand in order of their seeds; logprobs and prompt logprobs are there when asked for."""
    params = SamplingParams(n=3, seed=5, max_tokens=4, logprobs=0, prompt_logprobs=0)
    (output,) = model.generate("abc", params, use_tqdm=False)
    assert [s.token_ids for s in output.outputs] == [continuation((0, 1, 2), 4, seed) for seed in (5, 6, 7)]
    assert [len(s.logprobs or ()) for s in output.outputs] == [4, 4, 4]
    assert [entry and entry.token_id for entry in output.prompt_logprobs or ()] == [None, 1, 2]


def test_embeddings(model: LLM) -> None:
    """Embed returns a vector per prompt."""
    assert [e.embedding[3] for e in model.embed(["ab", "abc"], use_tqdm=False)] == [2.0, 3.0]


def test_progress_shows_both_rates(model: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    """The progress bar counts prompts and shows prefill and decode tokens per second; use_tqdm switches it off."""
    model.generate(["a", "b"], greedy())
    shown = capfd.readouterr().err
    assert "2/2" in shown
    assert "prefill" in shown
    assert "decode" in shown
    model.generate(["a", "b"], greedy(), use_tqdm=False)
    assert capfd.readouterr().err == ""


def test_a_bad_prompt_is_refused_before_anything_runs(model: LLM, runner: StubRunner) -> None:
    """One prompt or parameter that can never be served is named, and nothing was computed for the others."""
    with pytest.raises(InvalidRequestError, match="maximum context length"):
        model.generate([{"prompt_token_ids": [1]}, {"prompt_token_ids": [1] * 9999}], greedy(), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="temperature"):
        model.generate("a", greedy(temperature=float("nan")), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="prompt_token_ids"):
        model.generate([{"text": "a"}], greedy(), use_tqdm=False)  # type: ignore[dict-item]
    with pytest.raises(InvalidRequestError, match="max_tokens = 99999 is not allowed: this model's maximum context"):
        model.generate(["a", "b"], [greedy(), greedy(max_tokens=99_999)], use_tqdm=False)
    assert runner.plans == []


def test_a_failure_is_raised_as_itself(model: LLM, runner: StubRunner) -> None:
    """When the model fails on a prompt, that error is raised, and the next call works."""

    def fail(plan: StepPlan) -> None:
        raise ZeroDivisionError

    runner.hook = fail
    with pytest.raises(RequestFailedError):
        model.generate(["a", "b"], greedy(n=2), use_tqdm=False)
    runner.hook = None
    assert model.generate("a", greedy(), use_tqdm=False)[0].outputs[0].token_ids == continuation((0,), 6)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("max_batchsize", 4, "no such setting"),
        ("max_batch_size", "4", "must be int"),
        ("dtype", "float12", "'float16'"),
        ("quantization", "int4", "must be 'int8' or 'int8-weights' or None"),
    ],
)
def test_a_wrong_setting_is_named(runner: StubRunner, setting: str, value: object, said: str) -> None:
    """A setting that does not exist, or a value of another type, is an error that names it."""
    with pytest.raises(ConfigError, match=said) as caught:
        LLM(**{setting: value})  # type: ignore[arg-type]
    assert setting in str(caught.value)


@pytest.mark.parametrize("value", ["int8", None])
def test_a_setting_may_be_given_as_its_default(runner: StubRunner, value: str | None) -> None:
    """Settings that are None or one of some words take both, as config.yaml spells them all out."""
    with LLM(quantization=value, max_model_len=None) as model:
        assert len(model.generate("a", greedy(), use_tqdm=False)) == 1


def test_engines_follow_one_another(runner: StubRunner) -> None:
    """A closed LLM leaves no thread behind, and another may be made."""
    threads = threading.active_count()
    for _ in range(3):
        with LLM() as model:
            assert len(model.generate("a", greedy(), use_tqdm=False)) == 1
        assert threading.active_count() == threads
    model.close()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": "1"}, "temperature = '1' is not allowed: must be float"),
        ({"top_k": 1.5}, "top_k = 1.5 is not allowed: must be int"),
        ({"n": "2"}, "n = '2' is not allowed: must be int"),
        ({"n": 10**6}, "n = 1000000 is not allowed: this engine has"),
        ({"max_tokens": 2.0}, "max_tokens = 2.0 is not allowed: must be int or None"),
        ({"max_tokens": True}, "max_tokens = True is not allowed: must be int or None"),
        ({"seed": "x"}, "seed = 'x' is not allowed: must be int or None"),
        ({"stop": [3]}, r"stop = \(3,\) is not allowed: must be a list of str"),
        ({"logit_bias": {"5": 1}}, "logit_bias = {'5': 1} is not allowed: must be a dict of int to float"),
        ({"stop_token_ids": 5}, "stop_token_ids = 5 is not allowed: must be a list of int"),
        ({"structured_outputs": {"regex": "a"}}, "must be StructuredOutputs or None"),
        ({"structured_outputs": StructuredOutputs(choice="abc")}, "structured_outputs.choice = 'abc' is not allowed"),
        ({"structured_outputs": StructuredOutputs(grammar=3)}, "structured_outputs.grammar = 3 is not allowed"),  # type: ignore[arg-type]
        ({"grammar": "x"}, "grammar = 'x' is not allowed: must be Grammar or None"),
    ],
)
def test_a_parameter_of_another_type_is_named(
    model: LLM, runner: StubRunner, fields: dict[str, Any], says: str
) -> None:
    """What a type checker would have told is told before anything runs."""
    with pytest.raises(InvalidRequestError, match=says):
        model.generate("a", SamplingParams(**fields), use_tqdm=False)
    assert runner.plans == []


def test_numbers_and_lists_of_other_kinds_are_taken(model: LLM) -> None:
    """An integer is a number, a list does for a tuple, numpy's scalars are numbers, and one stop string is a list."""
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": np.int64(3), "stop_token_ids": [59], "stop": None}
    (plain,) = model.generate("abc", SamplingParams(**fields), use_tqdm=False)
    text = plain.outputs[0].text
    (cut,) = model.generate("abc", SamplingParams(**{**fields, "stop": text[1]}), use_tqdm=False)
    assert cut.outputs[0].text == text[0]


@pytest.mark.parametrize("prompts", [None, 3, b"hi"])
def test_what_is_no_prompt_is_named(model: LLM, prompts: Any) -> None:
    """Nothing but text, token ids and lists of them is a prompt; messages are a list."""
    with pytest.raises(InvalidRequestError, match=f"A prompt is text or .*, not {prompts!r}"):
        model.generate(prompts, greedy(), use_tqdm=False)
    wrong: Any
    for wrong in (prompts, {"role": "user", "content": "hi"}):
        with pytest.raises(InvalidRequestError, match="messages is a list like"):
            model.chat(wrong, greedy(), use_tqdm=False)
