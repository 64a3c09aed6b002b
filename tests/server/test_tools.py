"""Tools over HTTP: what the model writes becomes calls, whole and streamed alike, through the real openai client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.client import use_client
from tests.server.helpers import Answer, ask, function, running
from tests.server.joined import streamed, whole
from tests.server.stub import TOKENIZER, StubRunner, open_stub, stub_tokenizer
from trio_llm.assemble import open_engine
from trio_llm.config import Config
from trio_llm.server.app import ServerApp, create_app

TEMPLATE = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer with <tool_call>.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WITH_TOOLS = stub_tokenizer(TEMPLATE)
HI: Any = [{"role": "user", "content": "hi"}]


WEATHER = function("get_weather", city={"enum": ["Tokyo", "Paris"]})
ADD = function("add", a={"type": "integer", "minimum": 0, "maximum": 99}, b={"enum": [1, 2]})
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Tokyo"}}\n</tool_call>'
ADD_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


async def asked(reply: str | None, status: int = 200, **fields: Any) -> Any:
    """Ask a model that wants to answer `reply`; return the answer's body or the error."""
    async with open_stub(StubRunner(reply=reply, max_model_len=2000), WITH_TOOLS) as engine:
        answer = await post(create_app(engine, Config()), **fields)
        assert answer.status == status, answer.body
        return answer.json() if status == 200 else answer.json()["error"]


async def post(app: ServerApp, **fields: Any) -> Answer:
    """Post a chat."""
    return await ask(app, "POST", "/v1/chat/completions", {"messages": HI, "tools": [WEATHER, ADD], **fields})


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the name and the arguments of every call."""
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", [])]


async def test_a_call_is_a_call() -> None:
    """What the model writes as a call is answered as one, with an id, and tool_calls as the reason to finish."""
    choice = (await asked(CALL))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert calls_of(choice["message"]) == [("get_weather", {"city": "Tokyo"})]
    assert choice["message"]["tool_calls"][0]["id"].startswith("call_")


async def test_text_stays_text_and_stands_beside_calls() -> None:
    """Without a call the answer is text; with one, the text before it is content."""
    plain = (await asked("No tool is needed."))["choices"][0]
    assert (plain["message"]["content"], plain["finish_reason"]) == ("No tool is needed.", "stop")
    assert "tool_calls" not in plain["message"]
    both = (await asked("Let me see. " + CALL))["choices"][0]["message"]
    assert both["content"].strip() == "Let me see."
    assert calls_of(both) == [("get_weather", {"city": "Tokyo"})]


async def test_without_tools_a_call_is_text() -> None:
    """Nobody who offered no tools gets calls: not without `tools`, not with tool_choice none."""
    for fields in ({"tools": None}, {"tool_choice": "none"}):
        message = (await asked(CALL, **fields))["choices"][0]["message"]
        assert message["content"] == CALL
        assert "tool_calls" not in message


async def test_parallel_calls() -> None:
    """Several calls are all answered; with parallel_tool_calls false, the first one alone."""
    two = CALL + "\n" + ADD_CALL
    message = (await asked(two))["choices"][0]["message"]
    assert calls_of(message) == [("get_weather", {"city": "Tokyo"}), ("add", {"a": 1, "b": 2})]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert len(calls_of((await asked(two, parallel_tool_calls=False))["choices"][0]["message"])) == 1


@pytest.mark.parametrize("parallel", [True, False])
async def test_required_is_held_to_calls(parallel: bool) -> None:
    """With tool_choice required, a model that wants to talk writes calls of the tools all the same."""
    for seed in range(4):
        answer = await asked(
            None, tool_choice="required", parallel_tool_calls=parallel, seed=seed, temperature=1, max_tokens=400
        )
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        calls = calls_of(choice["message"])
        assert calls
        assert parallel or len(calls) == 1
        for name, arguments in calls:
            assert set(arguments) == {"get_weather": {"city"}, "add": {"a", "b"}}[name]


async def test_a_named_tool_is_called() -> None:
    """tool_choice by name: exactly that tool, with arguments of its schema."""
    for name, keys in (("get_weather", {"city"}), ("add", {"a", "b"})):
        choice = {"type": "function", "function": {"name": name}}
        calls = calls_of((await asked("No!", tool_choice=choice, max_tokens=400))["choices"][0]["message"])
        assert [(called, set(arguments)) for called, arguments in calls] == [(name, keys)]


async def test_a_strict_tool_binds_free_calls() -> None:
    """With a strict tool, auto leaves text alone and refuses the model arguments outside the schema."""
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    wrong = CALL.replace("Tokyo", "Rome")
    assert (await asked("Hello.", tools=[strict]))["choices"][0]["message"]["content"] == "Hello."
    calls = calls_of((await asked(wrong, tools=[strict], max_tokens=400))["choices"][0]["message"])
    assert calls[0][1]["city"] in {"Tokyo", "Paris"}
    assert calls_of((await asked(wrong))["choices"][0]["message"]) == [("get_weather", {"city": "Rome"})]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": None, "tool_choice": "auto"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "bad name"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": 1}]}, "tools[0].type"),
        ({"tool_choice": "required", "tools": [function("f", a={"type": "nonsense"})]}, "tools"),
        ({"tool_choice": "required", "tools": [function("f", a={"type": "string", "pattern": "("})]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)
async def test_refusals(fields: dict[str, Any], param: str) -> None:
    """What contradicts itself or cannot be held to is a 400 naming the field."""
    assert (await asked(None, status=400, **fields))["param"] == param


@pytest.mark.parametrize("reply", [CALL, "Hm. " + CALL + "\n" + ADD_CALL, "Just <tool_call text.", CALL[:40], ""])
async def test_streamed_is_the_same(reply: str) -> None:
    """The deltas of a stream add up to the message of the whole answer, ids apart, and end once."""
    async with open_stub(StubRunner(reply=reply, max_model_len=2000), WITH_TOOLS) as engine:
        app = create_app(engine, Config())
        (said,) = whole((await post(app)).json())
        assert streamed((await post(app, stream=True)).events()) == [said]
    assert len(said.ends) == 1


async def test_turns_with_calls_are_rendered() -> None:
    """An earlier call and its result reach the model as its template writes them, cut arguments too."""
    called = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    async with open_stub(StubRunner(reply="ok", max_model_len=2000), WITH_TOOLS) as engine:
        app = create_app(engine, Config())
        told = await ask(app, "POST", "/tokenize", {"messages": turns})
        text = TOKENIZER.decode(told.json()["tokens"], skip_special_tokens=False)
        assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
        assert "tool\n3<|im_end|>" in text
        called["function"]["arguments"] = '{"a": [1, "x'
        answer = await post(app, messages=turns, return_prompt_text=True)
        assert '"arguments": {"a": [1, "x"]}' in answer.json()["prompt_text"]
        assert "messages[1].tool_calls[0].function.arguments" in answer.headers["warning"]


@pytest.fixture
async def demo() -> AsyncIterator[Any]:
    """Serve the demo model."""
    config = Config()
    async with open_engine(config) as engine, running(create_app(engine, config)) as server:
        yield server


async def test_the_demo_model_calls_tools(demo: Any) -> None:
    """The real client, socket, engine and model: the tool is called, whole and streamed alike, and its result told."""
    weather: Any = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather in a city.",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    question: Any = {"role": "user", "content": "What is the weather in Paris?"}

    def use(client: Any) -> tuple[Any, ...]:
        name = client.models.list().data[0].id

        def create(**fields: Any) -> Any:
            return client.chat.completions.create(
                **{"model": name, "messages": [question], "tools": [weather], "temperature": 0, **fields}
            )

        auto = create()
        required = create(tool_choice="required")
        named = create(tool_choice={"type": "function", "function": {"name": "get_weather"}})
        chunks = list(create(stream=True))
        call = auto.choices[0].message.tool_calls[0]
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "sky": "sunny"}'}
        told = create(messages=[question, auto.choices[0].message.model_dump(exclude_none=True), result])
        return auto, required, named, chunks, told

    auto, required, named, chunks, told = await use_client(demo, use)
    for answer in (auto, required, named):
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        assert list(json.loads(call.function.arguments)) == ["city"]
    assert auto.choices[0].finish_reason == "tool_calls"
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
    assert parts[0].function.name == "get_weather"
    written = "".join(part.function.arguments or "" for part in parts)
    assert written == auto.choices[0].message.tool_calls[0].function.arguments
    assert told.choices[0].finish_reason == "stop"
    assert told.choices[0].message.content
