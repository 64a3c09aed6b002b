"""Anthropic's API as the real anthropic client sees it, over a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import anthropic
import pydantic
import pytest
import trio

from tests.server.helpers import Running, running
from tests.server.scripted import KEY, MODEL, PLAIN_TEMPLATE, TEMPLATE, ScriptedRunner, call_text, serving
from tests.server.stub import StubRunner
from trio_llm.assemble import open_engine
from trio_llm.config import Config
from trio_llm.server.app import create_app

T = TypeVar("T")
HI: Any = [{"role": "user", "content": "hi"}]
WEATHER: Any = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = call_text("weather", city="Paris")
THINK: Any = {"type": "enabled", "budget_tokens": 1024}


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


async def use_client(server: Running, use: Callable[[anthropic.Anthropic], T], key: str = KEY) -> T:
    """Use the synchronous client in a thread, beside the server."""

    def work() -> T:
        plain = anthropic.DefaultHttpxClient(verify=False, trust_env=False)  # reading certificates takes half a second
        url = f"http://127.0.0.1:{server.port}"
        with anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, http_client=plain) as client:
            return use(client)

    return await trio.to_thread.run_sync(work)


def given(fields: dict[str, Any]) -> Any:
    """Complete the fields of a request; the client no longer has names for some that other clients send."""
    extra = {name: value for name, value in fields.items() if name in ("temperature", "top_p", "top_k")}
    extra |= fields.get("extra_body", {})
    named = {name: value for name, value in fields.items() if name not in {*extra, "extra_body"}}
    return {"model": MODEL, "max_tokens": 400, "messages": HI, "extra_body": extra, **named}


async def create(server: Running, **fields: Any) -> Any:
    """Ask for a whole message."""
    return await use_client(server, lambda client: client.messages.create(**given(fields)))


async def events_of(server: Running, **fields: Any) -> list[Any]:
    """Ask for a streamed message and return its events."""
    return await use_client(server, lambda client: list(client.messages.create(stream=True, **given(fields))))


def content(message: Any) -> list[dict[str, Any]]:
    """Return a message's blocks without the ids, which are new each time."""
    shown = ("type", "text", "thinking", "signature", "name", "input")
    return [{name: getattr(block, name, None) for name in shown} for block in message.content]


async def test_text(server: Running, runner: ScriptedRunner) -> None:
    """A message is one block of text with its usage, and the system prompt comes first."""
    message = await create(server, system="Be brief.", temperature=0, top_k=5, top_p=0.9, metadata={"user_id": "me"})
    assert [block.text for block in message.content] == ["Hello there."]
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens == len("Hello there.") + 1
    assert runner.prompts[-1].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>")


async def test_citations_are_a_list(server: Running) -> None:
    """Anthropic's types demand `citations` of a text; clients differ in whether null is one, an empty list is."""
    raw = await use_client(server, lambda client: client.messages.with_raw_response.create(**given({})))
    assert raw.http_response.json()["content"] == [{"type": "text", "text": "Hello there.", "citations": []}]


async def test_sampling_reaches_the_model(server: Running, runner: ScriptedRunner) -> None:
    """temperature, top_p, top_k and stop_sequences are those that the model is run with."""
    seen: list[Any] = []
    runner.hook = lambda plan: seen.extend(admission.params for admission in plan.admitted)
    await create(server, temperature=0.5, top_p=0.25, top_k=7, stop_sequences=["zzz"])
    assert [(p.temperature, p.top_p, p.top_k, p.stop, p.max_tokens) for p in seen] == [(0.5, 0.25, 7, ("zzz",), 400)]


async def test_the_three_kinds_of_input_tokens_add_up(server: Running) -> None:
    """The second message to one prompt reads most of it from the cache, and the sum is what count_tokens says."""
    messages: Any = [{"role": "user", "content": "x" * 64}]
    first, second = [(await create(server, messages=messages)).usage for _ in range(2)]
    counted = await use_client(server, lambda client: client.messages.count_tokens(model=MODEL, messages=messages))
    assert first.cache_read_input_tokens == 0 < second.cache_read_input_tokens
    for usage in (first, second):
        assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens
        assert usage.cache_creation_input_tokens == 0


async def test_counting_sees_system_and_tools(server: Running, runner: ScriptedRunner) -> None:
    """count_tokens counts the prompt that a message with the same fields would have."""
    fields: Any = {"system": [{"type": "text", "text": "Be brief."}], "tools": [WEATHER], "messages": HI}
    counted = await use_client(server, lambda client: client.messages.count_tokens(model=MODEL, **fields))
    usage = (await create(server, **fields)).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert counted.input_tokens > len("Be brief.") + len("Tells the weather.")


async def test_the_events_of_a_text(server: Running) -> None:
    """The events come in Anthropic's order, and the last but one bears the reason and the usage."""
    events = await events_of(server)
    deltas = [event for event in events if event.type == "content_block_delta"]
    assert [event.type for event in events if event not in deltas] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0].message.content == []
    assert events[0].message.stop_reason is None
    assert events[0].message.usage.input_tokens > 0
    assert "".join(event.delta.text for event in deltas) == "Hello there."
    assert events[-2].delta.stop_reason == "end_turn"
    assert events[-2].usage.output_tokens == len("Hello there.") + 1


async def test_a_stream_is_spelled_as_anthropic_spells_it(server: Running) -> None:
    """On the wire every event has its name, there is a ping, and no [DONE]."""

    def use(client: anthropic.Anthropic) -> str:
        raw = client.messages.with_raw_response.create(stream=True, **given({}))
        assert raw.headers["content-type"].startswith("text/event-stream")
        return raw.http_response.read().decode()

    text = await use_client(server, use)
    assert text.startswith('event: message_start\ndata: {"type":"message_start"')
    assert 'event: ping\ndata: {"type":"ping"}\n\n' in text
    assert text.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')


STREAMED = [
    ("Hello there.", {}),
    ("", {}),
    ("<think>\nHm, well.\n</think>\n\nYes.", {"thinking": THINK}),
    ("<think>Never done", {"thinking": THINK}),
    (CALL, {"tools": [WEATHER]}),
    (f"<think>I need it.</think>Let me see.\n{CALL}\n{CALL}", {"tools": [WEATHER], "thinking": THINK}),
    (f"{CALL}\n{CALL}", {"tools": [WEATHER], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
    ("Hello there.", {"max_tokens": 5}),
    ("Hello there.", {"stop_sequences": ["lo", "re"]}),
    (CALL, {"tools": [WEATHER], "tool_choice": {"type": "any"}}),
]


@pytest.mark.parametrize(("script", "fields"), STREAMED)
async def test_a_stream_says_what_the_whole_message_says(
    server: Running, runner: ScriptedRunner, script: str, fields: dict[str, Any]
) -> None:
    """The client's own accumulator makes of the events the message that is not streamed."""
    runner.say(script)

    def use(client: anthropic.Anthropic) -> tuple[Any, Any]:
        with client.messages.stream(**given(fields)) as stream:
            streamed = stream.get_final_message()
        return client.messages.create(**given(fields)), streamed

    whole, streamed = await use_client(server, use)
    assert content(streamed) == content(whole)
    assert (streamed.stop_reason, streamed.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert streamed.usage.output_tokens == whole.usage.output_tokens


async def test_stop_reasons(server: Running, runner: ScriptedRunner) -> None:
    """A limit, a stop sequence and a call each end a message under their own name."""
    cut = await create(server, max_tokens=5)
    assert (cut.stop_reason, cut.content[0].text) == ("max_tokens", "Hello")
    stopped = await create(server, stop_sequences=["xx", " the"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " the")
    assert stopped.content[0].text == "Hello"
    runner.say(CALL)
    assert (await create(server, tools=[WEATHER])).stop_reason == "tool_use"


async def test_a_call_that_is_cut_short_has_no_input(server: Running, runner: ScriptedRunner) -> None:
    """What cannot be read as JSON is not made up: the input is empty and the reason says why."""
    runner.say(CALL)
    message = await create(server, tools=[WEATHER], max_tokens=len(CALL) - 20)
    assert (message.stop_reason, message.content[0].input) == ("max_tokens", {})


async def test_thinking(server: Running, runner: ScriptedRunner) -> None:
    """A model that need not think does so only where it is asked to; a budget is not enforced, and that is said."""
    await create(server)
    assert runner.prompts[-1].endswith("assistant\n<think></think>")
    await create(server, thinking={"type": "disabled"})
    assert runner.prompts[-1].endswith("assistant\n<think></think>")
    runner.say("<think>\nHm.\n</think>\n\nYes.")
    raw = await use_client(
        server, lambda client: client.messages.with_raw_response.create(**given({"thinking": THINK}))
    )
    assert runner.prompts[-1].endswith("assistant\n")
    assert "budget_tokens is not enforced" in raw.headers["warning"]
    assert [(block.type, getattr(block, "thinking", None)) for block in raw.parse().content] == [
        ("thinking", "Hm.\n"),
        ("text", None),
    ]


async def test_a_round_trip_of_a_tool(server: Running, runner: ScriptedRunner) -> None:
    """A call comes out, goes back with its result and the thinking before it, and the model is told all of it."""
    runner.say(f"<think>I need it.</think>Let me see.{CALL}")
    first = await create(server, tools=[WEATHER], thinking=THINK)
    use = first.content[-1]
    assert (use.type, use.name, use.input) == ("tool_use", "weather", {"city": "Paris"})
    assert '"name": "weather"' in runner.prompts[-1]
    runner.say("It is sunny.")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "sunny"}]}
    failed = {"type": "tool_result", "tool_use_id": use.id, "content": "no", "is_error": True}
    text = {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}}
    messages = [
        *HI,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, failed, text]},
    ]
    second = await create(server, messages=messages, tools=[WEATHER], thinking=THINK)
    assert second.content[0].text == "It is sunny."
    assert runner.prompts[-1].split("<|im_start|>user\n", 1)[1] == (
        "hi<|im_end|>\n<|im_start|>assistant\n<think>I need it.</think>Let me see.<tool_call>"
        '{"name": "weather", "arguments": {"city": "Paris"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>tool\nError:\nno<|im_end|>\n"
        "<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_turns_of_one_role_are_one_turn(server: Running, runner: ScriptedRunner) -> None:
    """Neighbours are joined, as Anthropic documents it: many templates know nothing else than turns that alternate."""
    await create(server, messages=[*HI, {"role": "user", "content": [{"type": "text", "text": "you"}]}])
    assert "<|im_start|>user\nhi\nyou<|im_end|>" in runner.prompts[-1]


async def test_an_answer_can_be_begun(server: Running, runner: ScriptedRunner) -> None:
    """An assistant's turn at the end is where the model goes on."""
    await create(server, messages=[*HI, {"role": "assistant", "content": "It is"}])
    assert runner.prompts[-1].endswith("<|im_start|>assistant\nIt is")


async def test_what_is_asked_of_the_form_binds_the_model(server: Running, runner: ScriptedRunner) -> None:
    """A schema, a tool that must be used and a strict tool each hold the model to a grammar; nothing else does."""
    bound: list[bool] = []
    runner.hook = lambda plan: bound.extend(a.params.grammar is not None for a in plan.admitted)  # type: ignore[union-attr]
    runner.say("What I like")
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        message = await create(server, tools=[WEATHER], tool_choice=choice)
        assert (message.content[0].name, message.stop_reason) == ("weather", "tool_use")
    await create(server, tools=[{**WEATHER, "strict": True}])
    assert bound == [True] * 3
    await create(server, tools=[WEATHER])
    await create(server, tools=[WEATHER], tool_choice={"type": "none"})
    await create(server, tools=[], tool_choice={"type": "none"})
    assert bound[3:] == [False] * 3


async def test_parsed_output(server: Running, runner: ScriptedRunner) -> None:
    """The client's parse() gets its object, from a model that is held to the schema."""
    runner.say('{"name": "Zoe", "age": 7}')
    message = await use_client(server, lambda client: client.messages.parse(output_format=Person, **given({})))
    assert message.parsed_output == Person(name="Zoe", age=7)


TURN = {"role": "user", "content": "hi"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4096}, "max_tokens = 4096"),
    ({"temperature": 1.5}, "temperature"),
    ({"stop_sequences": list("abcde")}, "stop_sequences: 5 stop strings are too many: at most 4"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 4096}]}, "maximum context length is 2048"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        "messages[0].content[0].tool_use_id",
    ),
    ({"messages": [TURN, {"role": "assistant", "content": "x"}], "thinking": THINK}, "thinking"),
    (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}], "tool_choice": {"type": "any"}},
        "tool_choice needs tools",
    ),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "output_config.format.schema"),
    ({"extra_body": {"inference_geo": "eu"}}, "inference_geo"),
    ({"extra_body": {"container": "c"}}, "container"),
    ({"extra_body": {"output_format": {"type": "json_schema"}}}, "output_format"),
    ({"extra_body": {"stop": "x"}}, "stop"),
    ({"extra_body": {"seed": 5}}, "seed"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED)
async def test_refusals_name_the_field(server: Running, fields: dict[str, Any], named: str) -> None:
    """What is not done here is a 400 in Anthropic's shape, whose message names what the client sent."""
    with pytest.raises(anthropic.BadRequestError) as caught:
        await create(server, **fields)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert named in body["error"]["message"]
    assert "max_completion_tokens" not in body["error"]["message"]


async def test_what_asks_for_nothing_is_accepted(server: Running) -> None:
    """Values that say what holds anyway are no reason to refuse."""
    nothing: Any = {"service_tier": "auto", "output_config": {"effort": "high"}, "cache_control": {"type": "ephemeral"}}
    assert (await create(server, **nothing, extra_headers={"anthropic-beta": "x"})).content


async def test_errors_have_their_classes_and_shape(server: Running) -> None:
    """Unknown model, wrong key and wrong method are the exceptions that the client's users catch, in its shape."""
    with pytest.raises(anthropic.NotFoundError) as missing:
        await create(server, model="claude")
    with pytest.raises(anthropic.AuthenticationError) as unknown:
        await use_client(server, lambda client: client.messages.create(**given({})), "wrong")
    count: Any = {"model": MODEL, "messages": HI}
    with pytest.raises(anthropic.AuthenticationError):
        await use_client(server, lambda client: client.messages.count_tokens(**count), "wrong")
    with pytest.raises(anthropic.APIStatusError) as method:
        await use_client(server, lambda client: client.get("/v1/messages", cast_to=object))
    with pytest.raises(anthropic.NotFoundError) as batches:
        await use_client(server, lambda client: client.messages.batches.list())
    bodies: list[Any] = [error.value.body for error in (missing, unknown, method, batches)]
    kinds = ["not_found_error", "authentication_error", "invalid_request_error", "not_found_error"]
    assert [(body["type"], body["error"]["type"]) for body in bodies] == [("error", kind) for kind in kinds]
    assert "claude" in bodies[0]["error"]["message"]


async def test_what_is_refused_before_the_app_has_the_shape_too(server: Running) -> None:
    """A request that is refused by its head alone is an error in Anthropic's shape as well."""
    many = {f"x-{i}": "x" for i in range(200)}
    with pytest.raises(anthropic.APIStatusError) as caught:
        await use_client(server, lambda client: client.messages.create(extra_headers=many, **given({})))
    body: Any = caught.value.body
    assert (caught.value.status_code, body["type"]) == (431, "error")


@pytest.mark.parametrize(
    ("template", "thinking"),
    [(PLAIN_TEMPLATE, "enabled"), (TEMPLATE.replace("enable_thinking", "brief"), "disabled")],
)
async def test_thinking_that_cannot_be_had(template: str, thinking: str) -> None:
    """A model that cannot think, or cannot help it, answers as it does and says so in a Warning."""
    async with serving(ScriptedRunner("Yes."), template) as server:
        fields = given({"thinking": {**THINK, "type": thinking}, "output_config": {"effort": "low"}})
        raw = await use_client(server, lambda client: client.messages.with_raw_response.create(**fields))
        assert raw.parse().content[0].text == "Yes."
        assert "Ignored hints: thinking" in raw.headers["warning"]
        assert "Ignored hints: output_config.effort" in raw.headers["warning"]
        assert (
            "warning"
            not in (
                await use_client(server, lambda client: client.messages.with_raw_response.create(**given({})))
            ).headers
        )


async def test_thinking_can_be_left_out_of_the_answer(server: Running, runner: ScriptedRunner) -> None:
    """With `display: omitted` the model thinks and the message has no thinking."""
    runner.say("<think>\nHm.\n</think>\n\nYes.")
    message = await create(server, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in message.content] == ["text"]
    assert runner.prompts[-1].endswith("assistant\n")


async def test_a_failure_after_the_first_token_is_an_event() -> None:
    """A stream that fails raises in the client, in Anthropic's shape and without details of ours."""
    runner = StubRunner()

    def fail(plan: Any) -> None:
        if len(runner.plans) > 5:
            raise RuntimeError("the device is gone")

    runner.hook = fail
    async with serving(runner, PLAIN_TEMPLATE) as server:
        with pytest.raises(anthropic.APIStatusError) as caught:
            await events_of(server)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "api_error")
    assert "device" not in body["error"]["message"]


@pytest.mark.slow
async def test_the_demo_model_answers_messages() -> None:
    """The demo model says Tokyo, whole and streamed, writes JSON to a schema and uses the tool it must."""
    config = Config()
    async with open_engine(config) as engine, running(create_app(engine, config)) as server:

        def use(client: anthropic.Anthropic) -> tuple[Any, Any, Any, Any]:
            model = client.models.list().data[0].id

            def asked(question: str) -> Any:
                messages = [{"role": "user", "content": question}]
                return {"model": model, "max_tokens": 100, "extra_body": {"temperature": 0}, "messages": messages}

            whole = client.messages.create(**asked("What is the capital of Japan?"))
            with client.messages.stream(**asked("What is the capital of Japan?")) as stream:
                streamed = stream.get_final_text()
            parsed = client.messages.parse(output_format=Person, **asked("Make a JSON object for Zoe."))
            choice: Any = {"type": "any"}
            tool = client.messages.create(tools=[WEATHER], tool_choice=choice, **asked("How is the weather in Paris?"))
            return whole, streamed, parsed, tool

        whole, streamed, parsed, tool = await use_client(server, use)
    assert whole.content[0].text == streamed == "The capital of Japan is Tokyo."
    assert whole.stop_reason == "end_turn"
    assert isinstance(parsed.parsed_output, Person)
    assert (tool.stop_reason, tool.content[0].name, set(tool.content[0].input)) == ("tool_use", "weather", {"city"})
