"""`LLM.chat` and structured output offline: the code of the server, on the demo model, without HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.helpers import ask
from trio_llm import LLM, SamplingParams, StructuredOutputs, open_engine
from trio_llm.config import Config
from trio_llm.errors import InvalidRequestError
from trio_llm.params import Submission
from trio_llm.server.app import create_app
from trio_llm.server.templates.render_pool import shared_pool

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=24)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The demo model."""
    with LLM(num_kv_blocks=128) as llm:
        yield llm


def structured(**form: Any) -> SamplingParams:
    """Return greedy parameters with a form."""
    return SamplingParams(temperature=0, max_tokens=24, structured_outputs=StructuredOutputs(**form))


async def test_the_answer_is_the_servers(llm: LLM) -> None:
    """A conversation has the tokens and the message that /v1/chat/completions gives it."""
    (output,) = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    async with open_engine() as engine:
        body = {"messages": QUESTION, "temperature": 0, "max_tokens": 24}
        reply = await ask(create_app(engine, Config()), "POST", "/v1/chat/completions", body)
    choice = json.loads(reply.body)["choices"][0]
    assert output.outputs[0].message == choice["message"]
    assert "Tokyo" in output.outputs[0].text
    assert output.outputs[0].finish_reason == choice["finish_reason"] == "stop"


def test_many_conversations_and_samples(llm: LLM) -> None:
    """A list of conversations is answered in order, each with its own parameters; every sample has its message."""
    other = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    first, second = llm.chat([QUESTION, other], [GREEDY, SamplingParams(n=2, seed=1, max_tokens=5)], use_tqdm=False)
    assert first.outputs == llm.chat(QUESTION, GREEDY, use_tqdm=False)[0].outputs
    assert [sample.message and sample.message["role"] for sample in second.outputs] == ["assistant"] * 2


def test_closing_leaves_no_process() -> None:
    """What rendered the conversations of an LLM ends with it."""
    with LLM(num_kv_blocks=128) as llm:
        llm.chat(QUESTION, GREEDY, use_tqdm=False)
        renderers = list(shared_pool()._idle)
        assert renderers
    assert not any(renderer.is_alive for renderer in renderers)


def test_without_parameters_an_answer_ends_by_itself(llm: LLM) -> None:
    """A chat without parameters is not cut at sixteen tokens."""
    (output,) = llm.chat([{"role": "user", "content": "Tell me a story about a fox."}], use_tqdm=False)
    assert len(output.outputs[0].token_ids) > 16
    assert output.outputs[0].finish_reason == "stop"


def test_a_tool_that_must_be_called(llm: LLM) -> None:
    """With tool_choice "required" the message holds a call whose arguments satisfy the tool's schema."""
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        (output,) = llm.chat(QUESTION, GREEDY, tools=[WEATHER], tool_choice=choice, use_tqdm=False)
        message = output.outputs[0].message
        assert message is not None
        (call,) = message["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Oslo")


def test_a_conversation_with_a_form(llm: LLM) -> None:
    """Structured output binds the answer of a chat, too."""
    (output,) = llm.chat(QUESTION, structured(choice=["yes", "no"]), use_tqdm=False)
    assert output.outputs[0].text in ("yes", "no")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"choice": ["Paris", "Rome"]}, r"Paris|Rome"),
        ({"regex": r"[0-9]{3}"}, r"[0-9]{3}"),
        (
            {
                "json": {
                    "type": "object",
                    "properties": {"ok": {"const": True}},
                    "required": ["ok"],
                    "additionalProperties": False,
                },
                "disable_any_whitespace": True,
            },
            r'\{"ok": true\}',
        ),
        ({"json": '{"enum": [7]}', "disable_any_whitespace": True}, "7"),
        ({"grammar": 'start: "a" "b"'}, "ab"),
    ],
)
def test_every_form(llm: LLM, form: dict[str, Any], expected: str) -> None:
    """Each form of vLLM's structured outputs holds a completion to itself."""
    (output,) = llm.generate("The capital of France is", structured(**form), use_tqdm=False)
    assert re.fullmatch(expected, output.outputs[0].text)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"messages": "hello"}, "'messages': expected `array`, got `str`"),
        ({"messages": [QUESTION, "hello"]}, "'messages': expected `array`, got `str`"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": object()}]}, "cannot be written as JSON"),
        ({"messages": QUESTION, "tool_choice": "required"}, "tool_choice needs tools"),
        ({"messages": QUESTION, "tools": []}, "'tools'"),
        ({"messages": QUESTION, "chat_template_kwargs": 3}, "'chat_template_kwargs'"),
        ({"messages": QUESTION, "sampling_params": [GREEDY, GREEDY]}, "1 prompts, but 2 sets of parameters"),
        ({"messages": QUESTION, "sampling_params": {"temperature": 0}}, "SamplingParams(...), not dict"),
        ({"messages": QUESTION, "sampling_params": structured()}, "structured_outputs must have exactly one of json"),
        ({"messages": QUESTION, "sampling_params": structured(regex="a", choice=["b"])}, "exactly one of"),
        ({"messages": QUESTION, "sampling_params": structured(json={"type": 5})}, "structured_outputs.json"),
    ],
)
def test_what_is_wrong_is_named(llm: LLM, given: dict[str, Any], says: str) -> None:
    """A wrong argument is refused as the server would refuse the field, before anything is started."""
    with pytest.raises(InvalidRequestError) as caught:
        llm.chat(**given, use_tqdm=False)
    assert says in str(caught.value)


def test_an_uncompiled_form_does_not_reach_the_engine(llm: LLM) -> None:
    """The engine itself takes grammars only: a form that nobody compiled is refused, never ignored."""
    with pytest.raises(InvalidRequestError, match="a compiled `grammar`, which LLM makes of it"):
        llm._bridge.call_sync(llm._engine.open_stream, Submission([1], structured(regex="a")))
