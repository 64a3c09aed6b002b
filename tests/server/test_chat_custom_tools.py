"""Custom tools of chat completions, through the real openai client and its types; and choices among tools."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion_message_custom_tool_call import ChatCompletionMessageCustomToolCall

from tests.server.client import use_client
from tests.server.helpers import ask, function
from tests.server.scripted import KEY, TEMPLATE, ScriptedRunner, call_text, serving
from tests.server.stub import StubRunner, open_stub, stub_tokenizer
from trio_llm.config import Config
from trio_llm.server.app import create_app

PATCH = '*** Begin Patch\n*** Add File: "a".txt\n+é🤗\n*** End Patch'
HI: Any = [{"role": "user", "content": "hi"}]
SEARCH = function("search", q={"type": "string"})
PING = function("ping")


def custom(name: str = "apply_patch", syntax: str | None = None, definition: str = "[ab]{3}") -> dict[str, Any]:
    """Return a custom tool, with a grammar of its input if there is a syntax."""
    form = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}} if syntax else {"type": "text"}
    return {"type": "custom", "custom": {"name": name, "description": "Edits files.", "format": form}}


async def asked(reply: str | None, **fields: Any) -> Any:
    """Ask a model that wants to answer `reply`, and return its answer and the prompt; None for anything."""
    runner = ScriptedRunner(reply) if reply is not None else StubRunner(max_model_len=2048)
    async with open_stub(runner, stub_tokenizer(TEMPLATE)) as engine:
        answer = await ask(create_app(engine, Config()), "POST", "/v1/chat/completions", {"messages": HI, **fields})
    return answer, runner.prompts[0] if isinstance(runner, ScriptedRunner) and runner.prompts else ""


def called(answer: Any) -> list[str]:
    """Return the names of the tools that an answer calls."""
    calls = answer.json()["choices"][0]["message"].get("tool_calls", [])
    return [call[call["type"]]["name"] for call in calls]


async def test_a_custom_tool_is_called_with_a_text() -> None:
    """The model sees a function with its grammar; the client gets the text, whole and in a stream."""
    runner = ScriptedRunner(call_text("search", q="x") + "\n" + call_text("apply_patch", input=PATCH))
    async with serving(runner) as server:
        tools = [SEARCH, custom(syntax="lark", definition='start: "*** Begin Patch"')]
        body: Any = {"model": "stub-model", "messages": HI, "tools": tools}
        whole = await use_client(server, lambda client: client.chat.completions.create(**body), KEY)
        chunks = await use_client(server, lambda client: list(client.chat.completions.create(**body, stream=True)), KEY)
    assert isinstance(whole, ChatCompletion)
    calls: Any = whole.choices[0].message.tool_calls
    assert isinstance(calls[1], ChatCompletionMessageCustomToolCall)
    assert (calls[0].type, calls[1].custom.name, calls[1].custom.input) == ("function", "apply_patch", PATCH)
    assert whole.choices[0].finish_reason == "tool_calls"
    for text in ("apply_patch", "Edits files.", "lark grammar", "*** Begin Patch", '"input"'):
        assert text in runner.prompts[0]
    parts: list[Any] = [
        call.to_dict() for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()
    ]
    patch = [part for part in parts if part["index"] == 1]
    assert (patch[0]["type"], patch[0]["custom"]) == ("custom", {"name": "apply_patch", "input": ""})
    assert "".join(part["custom"]["input"] for part in patch) == PATCH
    arguments = "".join(part["function"]["arguments"] for part in parts if part["index"] == 0)
    assert json.loads(arguments) == {"q": "x"}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (call_text("apply_patch", patch="x"), '{"patch": "x"}'),
        (call_text("apply_patch", input=5), '{"input": 5}'),
        (call_text("apply_patch", input="abc")[:-17], "ab"),
        ('<tool_call>\n{"name": "apply_patch", "arguments": {}}\n</tool_call>', "{}"),
    ],
)
async def test_a_model_may_miss_the_form(script: str, said: str) -> None:
    """What it wrote instead reaches the client; of a text that is cut short, the part that is there."""
    answer, _ = await asked(script, tools=[custom()])
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["custom"] == {"name": "apply_patch", "input": said}


async def test_calls_come_back_in_the_history() -> None:
    """The model sees an earlier call of a custom tool as the function's."""
    call = {"id": "c1", "type": "custom", "custom": {"name": "apply_patch", "input": PATCH}}
    turns = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "Ok!"}]
    answer, prompt = await asked("ok", messages=turns, tools=[custom()])
    assert answer.status == 200
    assert json.dumps({"input": PATCH}, ensure_ascii=False) in prompt and "Ok!" in prompt


async def test_the_format_of_a_custom_tool_binds_or_is_named() -> None:
    """A regular expression holds the text, of any call; a Lark grammar does not, a Warning says."""
    forced = {"type": "custom", "custom": {"name": "apply_patch"}}
    for choice in ("required", forced):
        answer, _ = await asked(None, tools=[custom(syntax="regex")], tool_choice=choice)
        (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
        assert set(call["custom"]["input"]) <= {"a", "b"} and len(call["custom"]["input"]) == 3
        assert "warning" not in answer.headers
    answer, _ = await asked("ok", tools=[custom(syntax="lark", definition='start: "x"')])
    assert "not held to it: apply_patch" in answer.headers["warning"]


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_only_allowed_tools_are_offered_and_called(mode: str) -> None:
    """A model that wants to call another tool cannot; with "auto" it may also talk."""
    allowed: Any = [{"type": "function", "function": {"name": "ping"}}, {"type": "custom", "custom": {"name": "note"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
    tools = [SEARCH, PING, custom("note")]
    answer, prompt = await asked(call_text("search", q="x"), tools=tools, tool_choice=choice, max_tokens=300)
    assert "search" not in prompt and "ping" in prompt and "note" in prompt
    assert "search" not in called(answer) and set(called(answer)) <= {"ping", "note"}
    answer, _ = await asked(call_text("ping"), tools=tools, tool_choice=choice)
    assert called(answer) == ["ping"]
    answer, _ = await asked("Just talk.", tools=tools, tool_choice=choice, max_tokens=300)
    assert bool(called(answer)) is (mode == "required")


async def test_allowed_tools_of_responses() -> None:
    """The same of /v1/responses: names of its own form, and the choice comes back as it was sent."""
    search, ping = ({"type": "function", **tool["function"]} for tool in (SEARCH, PING))
    note = {"type": "namespace", "name": "docs", "tools": [{"type": "custom", "name": "note"}]}
    allowed = [{"type": "function", "name": "ping"}, {"type": "custom", "name": "note"}]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": allowed}
    runner = ScriptedRunner(call_text("docs__note", input="y"))
    async with open_stub(runner, stub_tokenizer(TEMPLATE)) as engine:
        body = {"input": "x", "tools": [search, ping, note], "tool_choice": choice}
        answer = await ask(create_app(engine, Config()), "POST", "/v1/responses", body)
    (item,) = answer.json()["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "note", "y")
    assert "search" not in runner.prompts[0] and "docs__note" in runner.prompts[0]
    assert answer.json()["tool_choice"] == choice


@pytest.mark.parametrize(
    ("fields", "says", "param"),
    [
        ({"tools": [{"type": "custom"}]}, "Missing", "tools[0].custom"),
        ({"tools": [{"type": "function", "custom": {"name": "x"}}]}, "Missing", "tools[0].function"),
        ({"tools": [{**custom(), "function": {"name": "x"}}]}, "no field", "tools[0]"),
        ({"tools": [custom("a b")]}, "tools[0].custom.name", "tools[0].custom.name"),
        ({"tools": [custom(syntax="ebnf")]}, "ebnf", "tools[0].custom.format.grammar.syntax"),
        ({"tools": [custom(syntax="regex", definition="[")]}, "tools", "tools"),
        ({"tools": [custom("search"), SEARCH]}, "same name", "tools"),
        ({"tools": [custom()], "tool_choice": {"type": "custom"}}, "Missing", "tool_choice.custom"),
        ({"tools": [custom()], "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "'x'", "tool_choice"),
        (
            {"tools": [custom()], "tool_choice": {"type": "allowed_tools"}},
            "Missing",
            "tool_choice.allowed_tools",
        ),
        (
            {
                "tools": [custom()],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "x"}}]},
                },
            },
            "'x'",
            "tool_choice",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "x"}}]}]},
            "Missing",
            "messages[0].tool_calls[0].custom.input",
        ),
    ],
)
async def test_what_is_wrong_is_refused_by_field(fields: dict[str, Any], says: str, param: str) -> None:
    """The error names the field."""
    answer, _ = await asked("x", **fields)
    assert answer.status == 400
    assert says in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param
