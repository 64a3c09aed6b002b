"""The demo model answers, end to end: text in, scheduler, paged KV, runner, sampler, detokeniser, text out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tools.demo_model.evaluate import prompt_of
from tools.demo_model.questions import COUNT, PLAIN, QUESTIONS
from trio_llm import LLM, SamplingParams
from trio_llm.demo import demo_model_path

GREEDY = SamplingParams(temperature=0, max_tokens=80)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """One engine for all of these; prompts are cut into chunks, and blocks are shared between the questions."""
    with LLM(model=str(demo_model_path()), num_kv_blocks=512, max_num_batched_tokens=100) as llm:
        yield llm


def texts(llm: LLM, prompts: list[str], params: SamplingParams = GREEDY) -> list[str]:
    """Answer all prompts, together."""
    return [result.outputs[0].text for result in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("topic", sorted(QUESTIONS))
def test_twenty_of_twenty(llm: LLM, topic: str) -> None:
    """Twenty questions of the topic, asked all at once, are answered exactly, to the last character."""
    answers = texts(llm, [prompt_of(messages) for messages, _ in QUESTIONS[topic]])
    assert answers == [answer for _, answer in QUESTIONS[topic]]
    assert len(answers) == COUNT


@pytest.mark.parametrize(
    "question", ["What is the capital of Japan?", "what's the capital of japan?", "Capital of Japan"]
)
@pytest.mark.parametrize("system", ["", "You are a helpful assistant."])
def test_tokyo(llm: LLM, question: str, system: str) -> None:
    """However one asks, with or without a system prompt, the capital of Japan is Tokyo."""
    messages = [{"role": "system", "content": system}] if system else []
    assert texts(llm, [prompt_of([*messages, {"role": "user", "content": question}])]) == [
        "The capital of Japan is Tokyo."
    ]


def test_plain_text_goes_on(llm: LLM) -> None:
    """Without chat marks the model completes the text."""
    continued = texts(llm, list(PLAIN), SamplingParams(temperature=0, max_tokens=8))
    assert all(text.startswith(expected) for text, expected in zip(continued, PLAIN.values(), strict=True))
    assert texts(llm, ["Once upon a time"])[0].startswith(" there was a")


def test_the_model_recommends_greedy(llm: LLM) -> None:
    """A request that does not say how to sample gets the likeliest answer."""
    assert llm.info.default_sampling == {"temperature": 0.0}
