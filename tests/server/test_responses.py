"""POST /v1/responses as the real openai client sees it, over a real socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest

from tests.server.client import use_client
from tests.server.helpers import Running, running
from tests.server.scripted import KEY, MODEL, PLAIN_TEMPLATE, ScriptedRunner, call_text, serving
from tests.server.stub import StubRunner
from trio_llm.assemble import open_engine
from trio_llm.config import Config
from trio_llm.server.app import create_app
from trio_llm.server.parsing.reasoning import count_reasoning_tokens

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": None,
}
CALL = call_text("weather", city="Paris")


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture
async def runner() -> ScriptedRunner:
    """Return a model to write scripts for."""
    return ScriptedRunner("Hello there.")


@pytest.fixture
async def server(runner: ScriptedRunner) -> AsyncIterator[Running]:
    """Serve it."""
    async with serving(runner) as server:
        yield server


async def create(server: Running, **fields: Any) -> Any:
    """Ask for a whole response."""
    given = {"model": MODEL, "input": "hi", **fields}
    return await use_client(server, lambda client: client.responses.create(**given), KEY)


async def events_of(server: Running, **fields: Any) -> list[Any]:
    """Ask for a streamed response and return its events."""
    given = {"model": MODEL, "input": "hi", "stream": True, **fields}
    return await use_client(server, lambda client: list(client.responses.create(**given)), KEY)


def content(response: Any) -> list[dict[str, Any]]:
    """Return a response's items without the ids, which are new each time, and without what the client adds."""
    shown = ("type", "status", "role", "name", "arguments")
    return [
        {name: getattr(item, name, None) for name in shown}
        | {"texts": [part.text for part in getattr(item, "content", None) or ()]}
        for item in response.output
    ]


async def test_text(server: Running, runner: ScriptedRunner) -> None:
    """A response is one message, with its usage, and says back what it was asked by."""
    response = await create(server, instructions="Be brief.", max_output_tokens=50, temperature=0, metadata={"a": "b"})
    assert response.output_text == "Hello there."
    assert (response.status, response.object, response.store) == ("completed", "response", False)
    assert (response.error, response.incomplete_details, response.metadata) == (None, None, {"a": "b"})
    assert (response.instructions, response.max_output_tokens) == ("Be brief.", 50)
    assert response.usage.output_tokens == len("Hello there.") + 1
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert runner.prompts[-1].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>")


async def test_cached_tokens_are_counted(server: Running) -> None:
    """The second response to one prompt says how much of it came from the prefix cache."""
    first, second = [(await create(server, input="x" * 64)).usage for _ in range(2)]
    assert first.input_tokens_details.cached_tokens == 0
    assert 0 < second.input_tokens_details.cached_tokens < second.input_tokens == first.input_tokens


async def test_the_events_of_a_text(server: Running) -> None:
    """The events come in OpenAI's order, numbered from 0, and the last one bears the whole response."""
    events = await events_of(server)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [event.type for event in events if event not in deltas] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == "Hello there." == events[-1].response.output_text
    assert {event.item_id for event in deltas} == {events[-1].response.output[0].id}
    assert events[0].response.status == "in_progress"
    assert events[2].item.content == []
    assert events[-1].response.id == events[0].response.id


SCRIPTS = [
    ("Hello there.", {}),
    ("", {}),
    ("<think>\nHm, well.\n</think>\n\nYes.", {}),
    ("<think>Never done", {}),
    (CALL, {"tools": [WEATHER]}),
    (f"<think>I need it.</think>Let me see.\n{CALL}\n{CALL}", {"tools": [WEATHER]}),
    (f"{CALL}\n{CALL}", {"tools": [WEATHER], "parallel_tool_calls": False}),
    ("Hello there.", {"max_output_tokens": 5}),
    (f"One.{CALL}", {"tools": [WEATHER], "max_output_tokens": 50}),
]


@pytest.mark.parametrize(("script", "fields"), SCRIPTS)
async def test_a_stream_says_what_the_whole_response_says(
    server: Running, runner: ScriptedRunner, script: str, fields: dict[str, Any]
) -> None:
    """The client's own accumulator, the last event and the response that was not streamed agree."""
    runner.say(script)
    given: Any = {"model": MODEL, "input": "hi", **fields}

    def use(client: openai.OpenAI) -> tuple[Any, list[Any]]:
        with client.responses.stream(**given) as stream:
            return client.responses.create(**given), list(stream)

    whole, events = await use_client(server, use, KEY)
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert content(last.response) == content(whole)
    assert last.response.usage.output_tokens_details == whole.usage.output_tokens_details
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    for index, item in enumerate(last.response.output):
        added = [event.item for event in events if event.type == "response.output_item.added"][index]
        assert (added.id, added.status) == (item.id, "in_progress")
        deltas = [event for event in events if event.type.endswith(".delta") and event.output_index == index]
        text = item.arguments if item.type == "function_call" else item.content[0].text
        assert "".join(event.delta for event in deltas) == text


async def test_reasoning(server: Running, runner: ScriptedRunner) -> None:
    """What the model thinks is an item of its own, and its tokens are counted up to the end of the thinking."""
    thinking = "<think>\nHm.\n</think>"
    runner.say(f"{thinking}\n\nYes.")
    response = await create(server, reasoning={"effort": "high", "summary": "auto"})
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "Hm.\n"
    assert response.output_text == "Yes."
    assert response.usage.output_tokens_details.reasoning_tokens == len(thinking)
    await create(server, reasoning={"effort": "none"})
    assert runner.prompts[-1].endswith("assistant\n<think></think>")


def test_reasoning_tokens_are_found_wherever_they_end() -> None:
    """The count is exact for an end of the thinking at any place, spread over several tokens, or nowhere."""

    def decode(ids: Any) -> str:
        return "".join(map(chr, ids))

    for length in range(200):
        ids = [ord(character) for character in "x" * length + "</think>" + "y" * 70]
        assert count_reasoning_tokens(decode, ids) == length + len("</think>")
    assert count_reasoning_tokens(decode, [120] * 100) == 100


async def test_a_round_trip_of_a_tool(server: Running, runner: ScriptedRunner) -> None:
    """A call comes out, goes back with its output and the reasoning before it, and the model is told all of it."""
    runner.say(f"<think>I need it.</think>Let me see.{CALL}")
    first = await create(server, tools=[WEATHER], tool_choice="auto")
    _, _, made = first.output
    assert (made.type, made.name, json.loads(made.arguments)) == ("function_call", "weather", {"city": "Paris"})
    assert '"name": "weather"' in runner.prompts[-1]
    runner.say("It is sunny.")
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"type": "function_call_output", "call_id": made.call_id, "output": "sunny"},
    ]
    assert (await create(server, input=items, tools=[WEATHER])).output_text == "It is sunny."
    told = runner.prompts[-1].split("<|im_start|>user\n", 1)[1]
    assert told == (
        "hi<|im_end|>\n<|im_start|>assistant\n<think>I need it.</think>Let me see.<tool_call>"
        '{"name": "weather", "arguments": {"city": "Paris"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_what_is_asked_of_the_form_binds_the_model(server: Running, runner: ScriptedRunner) -> None:
    """A schema, JSON, and a tool that must be called each hold the model to a grammar; free text has none."""
    bound: list[bool] = []
    runner.hook = lambda plan: bound.extend(a.params.grammar is not None for a in plan.admitted)  # type: ignore[union-attr]
    schema = {"type": "json_schema", "name": "person", "schema": Person.model_json_schema(), "strict": True}
    for fields in (
        {"text": {"format": schema}},
        {"text": {"format": {"type": "json_object"}}},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}},
    ):
        await create(server, **fields)
    assert bound == [True] * 4
    await create(server, tools=[WEATHER], text={"format": {"type": "text"}})
    await create(server, tools=[], tool_choice="auto")
    assert bound[4:] == [False] * 2


async def test_parsed_output(server: Running, runner: ScriptedRunner) -> None:
    """The client's parse() gets its object."""
    runner.say('{"name": "Zoe", "age": 7}')
    response = await use_client(
        server, lambda client: client.responses.parse(model=MODEL, input="hi", text_format=Person, temperature=0), KEY
    )
    assert response.output_parsed == Person(name="Zoe", age=7)


async def test_an_answer_of_nothing(server: Running, runner: ScriptedRunner) -> None:
    """A model that says nothing is answered by a message of nothing, where clients look for one."""
    runner.say("")
    response = await create(server)
    assert [(item.type, item.status) for item in response.output] == [("message", "completed")]
    assert (response.output_text, response.status) == ("", "completed")


async def test_an_incomplete_response(server: Running) -> None:
    """Cut off by max_output_tokens, a response and its last item are incomplete and say why."""
    response = await create(server, max_output_tokens=5)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.output[0].status, response.output_text) == ("incomplete", "Hello")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_tool_calls": 1}, "max_tool_calls"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"temperature": 3}, "temperature"),
    ({"max_output_tokens": 4096}, "max_output_tokens"),
    ({"extra_body": {"max_tokens": 5}}, "max_tokens"),
    ({"extra_body": {"response_format": {"type": "json_object"}}}, "response_format"),
    ({"extra_body": {"stop": "x"}}, "stop"),
    ({"input": []}, "input"),
    ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input"),
    ({"input": "x" * 4096}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}, "input[0].call_id"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nope"}}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
async def test_refusals_name_the_field(server: Running, fields: dict[str, Any], param: str) -> None:
    """What is not done here is a 400 with the name that the client knows, and never a chat's."""
    with pytest.raises(openai.BadRequestError) as caught:
        await create(server, **fields)
    assert caught.value.param == param
    assert "max_completion_tokens" not in caught.value.message
    assert "messages" not in caught.value.message


async def test_what_asks_for_nothing_is_accepted(server: Running) -> None:
    """Values that say what holds anyway are no reason to refuse, and without a model there is only one."""
    nothing: Any = {"store": False, "background": False, "truncation": "disabled", "service_tier": "auto"}
    assert (await create(server, **nothing, include=[], previous_response_id=None, text={"verbosity": "medium"})).id
    clear: Any = {"include": ["reasoning.encrypted_content"]}
    raw = await use_client(
        server,
        lambda client: client.responses.with_raw_response.create(model=MODEL, input="hi", store=False, **clear),
        KEY,
    )
    assert "reasoning is in the clear" in raw.headers["warning"]


async def test_errors_have_their_classes(server: Running) -> None:
    """An unknown model and a wrong key are the exceptions that the client's users catch."""
    with pytest.raises(openai.NotFoundError):
        await create(server, model="gpt-6")
    with pytest.raises(openai.AuthenticationError):
        await use_client(server, lambda client: client.responses.create(model=MODEL, input="hi"), "wrong")


async def test_effort_is_a_hint() -> None:
    """A model whose template knows no thinking answers as it does, with a Warning; "none" asks for nothing."""
    async with serving(ScriptedRunner("Yes."), PLAIN_TEMPLATE) as server:
        for effort, warning in (("high", '299 trio-llm "Ignored hints: reasoning.effort'), ("none", "")):
            given: Any = {"model": MODEL, "input": "hi", "reasoning": {"effort": effort}}
            raw = await use_client(server, lambda c, given=given: c.responses.with_raw_response.create(**given), KEY)
            assert raw.parse().output_text == "Yes."
            assert raw.headers.get("warning", "")[: len(warning) or None] == warning


async def test_a_failure_after_the_first_token_is_an_event() -> None:
    """A stream that fails says so by response.failed, with what had come before it intact."""
    runner = StubRunner()

    def fail(plan: Any) -> None:
        if len(runner.plans) > 5:
            raise RuntimeError("the device is gone")

    runner.hook = fail
    async with serving(runner, PLAIN_TEMPLATE) as server:
        events = await events_of(server)
    assert events[0].type == "response.created"
    assert (events[-1].type, events[-1].response.status) == ("response.failed", "failed")
    assert events[-1].response.error.code == "server_error"
    assert "device" not in events[-1].response.error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.slow
async def test_the_demo_model_responds() -> None:
    """The demo model says Tokyo, whole and streamed, writes JSON to a schema and calls the tool it must."""
    config = Config()
    async with open_engine(config) as engine, running(create_app(engine, config)) as server:

        def use(client: openai.OpenAI) -> tuple[Any, Any, Any, Any]:
            create = client.responses.create
            asked: Any = {"model": client.models.list().data[0].id, "temperature": 0, "max_output_tokens": 100}
            question = "What is the capital of Japan?"
            whole = create(input=question, **asked)
            with client.responses.stream(input=question, **asked) as stream:
                streamed = stream.get_final_response()
            parsed = client.responses.parse(input="Make a JSON object for Zoe.", text_format=Person, **asked)
            tool = create(input="What is the weather in Paris?", tools=[WEATHER], tool_choice="required", **asked)
            return whole, streamed, parsed, tool

        whole, streamed, parsed, tool = await use_client(server, use)
    assert whole.output_text == streamed.output_text == "The capital of Japan is Tokyo."
    assert isinstance(parsed.output_parsed, Person)
    assert tool.output[0].name == "weather"
    assert set(json.loads(tool.output[0].arguments)) == {"city"}
