"""Thinking, tool calls and forms of output together, over HTTP, in the forms of every model family.

The models are stubs that say what a test wrote for them, wherever the grammar lets them.
"""

from __future__ import annotations

import json
import re
from typing import Any

import attrs
import pytest

from tests.server.helpers import ask, function
from tests.server.joined import Said, streamed, whole
from tests.server.stub import StubRunner, open_stub, stub_tokenizer
from trio_llm.config import Config
from trio_llm.server.app import create_app

TURNS = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
"""
# The families' templates are told apart by the words that they put round calls and thinking.
QWEN3 = (
    "{# <tool_call> </think> #}"
    + TURNS
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = "{# <tool_call> </think> #}" + TURNS + "<think>\n{% endif %}"
LLAMA3 = "{# <|python_tag|> #}" + TURNS + "{% endif %}"
MISTRAL = "{# [TOOL_CALLS] #}" + TURNS + "{% endif %}"


WEATHER = function("get_weather", city={"enum": ["Tokyo", "Paris"]})
ADD = function("add", a={"enum": [1, 2]}, b={"enum": [1, 2]})
NAMED = {"type": "function", "function": {"name": "add"}}
ANSWER = {
    "type": "object",
    "properties": {"sky": {"enum": ["blue", "grey"]}},
    "required": ["sky"],
    "additionalProperties": False,
}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "sky", "schema": ANSWER}}


@attrs.frozen
class Family:
    """How one family of models writes calls.

    Attributes:
        two: A call of `get_weather` for Tokyo and one of `add` for 1 and 2.
        special: Control tokens of its tokenizer.
    """

    template: str
    one: str
    two: str
    special: tuple[str, ...] = ()


def written(key: str, joint: str = ", ", before: str = "", after: str = "") -> tuple[str, str]:
    """Spell the first of two calls alone, and both."""
    calls = [
        before + json.dumps({"name": name, key: arguments}) + after
        for name, arguments in (("get_weather", {"city": "Tokyo"}), ("add", {"a": 1, "b": 2}))
    ]
    return calls[0], joint.join(calls)


HERMES_CALLS = written("arguments", "\n", "<tool_call>\n", "\n</tool_call>")
LLAMA_CALLS = written("parameters", "; ")
MISTRAL_CALLS = tuple(f"[TOOL_CALLS] [{calls}]" for calls in written("arguments"))
NEW_MISTRAL = '[TOOL_CALLS]get_weather[ARGS]{"city": "Tokyo"}'
FAMILIES = {
    "qwen3": Family(QWEN3, *HERMES_CALLS),
    "qwen3, control tokens": Family(QWEN3, *HERMES_CALLS, ("<tool_call>", "</tool_call>", "<think>", "</think>")),
    "llama3": Family(LLAMA3, *LLAMA_CALLS, ("<|python_tag|>", "<|eom_id|>")),
    "mistral": Family(MISTRAL, *MISTRAL_CALLS, ("[TOOL_CALLS]",)),
    "mistral, names before": Family(
        MISTRAL, NEW_MISTRAL, NEW_MISTRAL + '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}', ("[TOOL_CALLS]", "[ARGS]")
    ),
}
# A stub that may think and wants to say what it must not thinks at random, and without end.
BRIEF = {"chat_template_kwargs": {"enable_thinking": False}}
THE_ONE, THE_OTHER = ["get_weather", '{"city": "Tokyo"}'], ["add", '{"a": 1, "b": 2}']


async def said(family: Family, reply: str, **fields: Any) -> list[Said]:
    """Ask a model that wants to answer `reply`, whole and streamed; return what it says, which must be the same."""
    tokenizer = stub_tokenizer(family.template, *family.special)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 300, "seed": 1, "temperature": 1, **fields}
    async with open_stub(StubRunner(reply=reply, max_model_len=2000, tokenizer=tokenizer), tokenizer) as engine:
        app = create_app(engine, Config())
        answer = await ask(app, "POST", "/v1/chat/completions", body)
        assert answer.status == 200, answer.body
        told = whole(answer.json())
        assert streamed((await ask(app, "POST", "/v1/chat/completions", {**body, "stream": True})).events()) == told
    return told


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
async def test_calls_in_every_family(family: Family) -> None:
    """What a model writes as calls is told as calls, whole and streamed alike; text without a call stays text."""
    for reply, calls in ((family.one, [THE_ONE]), (family.two, [THE_ONE, THE_OTHER])):
        (told,) = await said(family, reply, tools=[WEATHER, ADD])
        assert told == Said(calls=calls, ends=[("tool_calls", None)])
    (told,) = await said(family, "It is sunny {or so}.", tools=[WEATHER, ADD])
    assert told == Said(content="It is sunny {or so}.", ends=[("stop", None)])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
async def test_required_and_named_bind_every_family(family: Family) -> None:
    """A model that wants to talk calls all the same, any tool or the named one, with arguments of its schema."""
    fields = {**BRIEF, "tools": [WEATHER, ADD]}
    (told,) = await said(family, "No!", tool_choice="required", parallel_tool_calls=False, **fields)
    ((name, arguments),) = told.calls
    assert set(json.loads(arguments)) == {"get_weather": {"city"}, "add": {"a", "b"}}[name]
    (told,) = await said(family, "No!", tool_choice=NAMED, **fields)
    ((name, arguments),) = told.calls
    assert (name, set(json.loads(arguments))) == ("add", {"a", "b"})
    assert (told.content, told.ends) == ("", [("tool_calls", None)])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
async def test_a_call_or_the_form_that_was_asked_for(family: Family) -> None:
    """With tools and a response_format the model may call or answer in the form, and do nothing else."""
    both = {**BRIEF, "tools": [WEATHER, ADD], "response_format": AS_JSON}
    for reply, calls in ((family.one, [THE_ONE]), (family.two, [THE_ONE, THE_OTHER])):
        (told,) = await said(family, reply, **both)
        assert told == Said(calls=calls, ends=[("tool_calls", None)])
    (told,) = await said(family, '{"sky": "grey"}', **both)
    assert told == Said(content='{"sky": "grey"}', ends=[("stop", None)])
    (told,) = await said(family, family.one.replace("Tokyo", "Rome"), **both)
    name, arguments = told.calls[0]
    assert (name, json.loads(arguments)["city"] in {"Tokyo", "Paris"}) == ("get_weather", True)
    for seed in range(4):
        (told,) = await said(family, "Well, let me see.", seed=seed, **both)
        assert told.calls or json.loads(told.content)["sky"] in {"blue", "grey"}
    (told,) = await said(family, '{"sky": "grey"}', tool_choice="required", **both)
    assert told.calls
    assert not told.content


async def test_what_tools_refer_to_stands_beside_an_answer_too() -> None:
    """A Llama call beside a JSON answer is a schema of its own, in which the tool's references are still found."""
    schema = {"type": "object", "properties": {"city": {"$ref": "#/$defs/c"}}, "required": ["city"]}
    tool = {"type": "function", "function": {
        "name": "get_weather", "parameters": {**schema, "$defs": {"c": {"enum": ["Tokyo"]}}}}}  # fmt: skip
    family = FAMILIES["llama3"]
    (told,) = await said(family, family.one.replace("Tokyo", "Rome"), tools=[tool], response_format=AS_JSON)
    assert json.loads(told.calls[0][1]) == {"city": "Tokyo"}


THINKING = {
    "opened by the template": (Family(R1, *HERMES_CALLS), 'Hm, {"sky": 1}?</think>\n\n'),
    "begun by the model": (FAMILIES["qwen3"], '<think>\nHm, {"sky": 1}?</think>\n\n'),
    "in control tokens": (FAMILIES["qwen3, control tokens"], '<think>\nHm, {"sky": 1}?</think>\n\n'),
}
THOUGHT = 'Hm, {"sky": 1}?'


@pytest.mark.parametrize(("family", "thought"), THINKING.values(), ids=THINKING.keys())
@pytest.mark.parametrize(
    ("fields", "reply", "accepts"),
    [
        ({"response_format": AS_JSON}, '{"sky": "blue"}', lambda text: json.loads(text)["sky"] in {"blue", "grey"}),
        ({"response_format": {"type": "json_object"}}, '{"a": 1}', lambda text: isinstance(json.loads(text), dict)),
        ({"structured_outputs": {"regex": "[0-9]{3}-x"}}, "123-x", lambda text: re.fullmatch("[0-9]{3}-x", text)),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "green", lambda text: text in {"red", "green"}),
        ({"structured_outputs": {"grammar": 'start: "a" ("b" | "c")'}}, "ac", lambda text: text in {"ab", "ac"}),
        ({"structured_outputs": {"grammar": 'root ::= "a" ("b" | "c")'}}, "ac", lambda text: text in {"ab", "ac"}),
    ],
)  # fmt: skip
async def test_a_form_begins_behind_the_thinking(
    family: Family, thought: str, fields: dict[str, Any], reply: str, accepts: Any
) -> None:
    """Thinking is free, the answer behind it is held to its form, for every sample and in streams too."""
    for told in await said(family, thought + reply, n=2, **fields):
        assert told == Said(content=reply, reasoning=THOUGHT, ends=[("stop", None)])
    for told in await said(family, thought + "No!", n=3, **fields):
        assert told.reasoning == THOUGHT
        assert accepts(told.content), told.content


@pytest.mark.parametrize(("family", "thought"), THINKING.values(), ids=THINKING.keys())
async def test_a_call_comes_behind_the_thinking(family: Family, thought: str) -> None:
    """Required and strict tools bind behind the thinking; calls that are only thought of are none."""
    musing = thought if family.special else thought.replace("Hm", "<tool_call> hm")
    (told,) = await said(family, musing + "No!", tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    assert told.reasoning in {THOUGHT, THOUGHT.replace("Hm", "<tool_call> hm")}
    assert [name for name, _ in told.calls] == ["get_weather"]
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    (told,) = await said(family, thought + family.one.replace("Tokyo", "Rome"), tools=[strict])
    assert json.loads(told.calls[0][1])["city"] in {"Tokyo", "Paris"}
    (told,) = await said(family, thought + "Hello.", tools=[strict])
    assert told == Said(content="Hello.", reasoning=THOUGHT, ends=[("stop", None)])
    (told,) = await said(family, thought + '{"sky": "grey"}', tools=[WEATHER], response_format=AS_JSON)
    assert told == Said(content='{"sky": "grey"}', reasoning=THOUGHT, ends=[("stop", None)])


async def test_thinking_that_the_template_closed_does_not_come() -> None:
    """Where thinking is switched off, and where a begun answer goes on, the form begins at once."""
    family = FAMILIES["qwen3"]
    begun = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So: "}],
             "continue_final_message": True, "add_generation_prompt": False}  # fmt: skip
    for fields in (BRIEF, begun):
        (told,) = await said(family, "<think>Hm</think>", structured_outputs={"choice": ["red", "green"]}, **fields)
        assert told.content in {"red", "green"}
        assert not told.reasoning


async def test_a_model_need_not_think() -> None:
    """Where thinking is the model's own choice, it may answer in the form at once."""
    (told,) = await said(FAMILIES["qwen3"], '{"sky": "blue"}', response_format=AS_JSON)
    assert told == Said(content='{"sky": "blue"}', ends=[("stop", None)])
