"""Custom tools and namespaces of /v1/responses, through the real openai client and its types."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import (
    Response,
    ResponseCustomToolCall,
    ResponseCustomToolCallInputDeltaEvent,
    ResponseCustomToolCallInputDoneEvent,
    ResponseFunctionToolCall,
)

from tests.server.client import use_client
from tests.server.helpers import ask
from tests.server.scripted import KEY, TEMPLATE, ScriptedRunner, call_text, serving
from tests.server.stub import open_stub, stub_tokenizer
from trio_llm.config import Config
from trio_llm.server.app import create_app

PATCH = '*** Begin Patch\n*** Add File: "a".txt\n+é🤗\n*** End Patch'
APPLY: dict[str, Any] = {"type": "custom", "name": "apply_patch", "description": "Edits files."}
LARK = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch"'}
SEARCH: dict[str, Any] = {
    "type": "function",
    "name": "search",
    "parameters": {"type": "object", "properties": {"q": {}}},
}
DOCS: dict[str, Any] = {
    "type": "namespace", "name": "docs", "description": "About docs.",
    "tools": [SEARCH, {"type": "custom", "name": "note"}],
}  # fmt: skip
TOOLS = [{**APPLY, "format": LARK}, DOCS]


async def responded(script: str, **fields: Any) -> tuple[Response, list[Any], str]:
    """Return a response whole, the events of the same one streamed, and the prompt."""
    runner = ScriptedRunner(script)
    async with serving(runner) as server:
        body: Any = {"model": "stub-model", "input": "Go.", "tools": TOOLS, **fields}
        whole = await use_client(server, lambda client: client.responses.create(**body), KEY)
        events = await use_client(server, lambda client: list(client.responses.create(**body, stream=True)), KEY)
    return whole, events, runner.prompts[0]


async def test_a_custom_tool_is_called_with_a_text() -> None:
    """The model sees a function with its grammar; the client gets the text, whole and in events."""
    whole, events, prompt = await responded(call_text("apply_patch", input=PATCH))
    (item,) = whole.output
    assert isinstance(item, ResponseCustomToolCall)
    assert (item.name, item.input, item.namespace) == ("apply_patch", PATCH, None)
    for text in ("apply_patch", "Edits files.", "lark grammar", "*** Begin Patch", '"input"'):
        assert text in prompt
    kinds = [event.type for event in events if "custom_tool" in event.type or "output_item" in event.type]
    assert kinds == [
        "response.output_item.added", "response.custom_tool_call_input.delta", "response.custom_tool_call_input.done",
        "response.output_item.done",
    ]  # fmt: skip
    deltas = [event.delta for event in events if isinstance(event, ResponseCustomToolCallInputDeltaEvent)]
    (done,) = [event for event in events if isinstance(event, ResponseCustomToolCallInputDoneEvent)]
    assert "".join(deltas) == done.input == PATCH
    assert events[-1].response.output[0].input == PATCH


async def test_tools_of_a_namespace_are_told_apart() -> None:
    """The model knows them by both names; a call comes back with its own name and the namespace."""
    script = call_text("docs__search", q="x") + "\n" + call_text("docs__note", input="y") + "\n" + call_text("z", a=1)
    whole, events, prompt = await responded(script)
    search, note, other = whole.output
    assert isinstance(search, ResponseFunctionToolCall)
    assert (search.name, search.namespace, json.loads(search.arguments)) == ("search", "docs", {"q": "x"})
    assert isinstance(note, ResponseCustomToolCall)
    assert (note.name, note.namespace, note.input) == ("note", "docs", "y")
    assert isinstance(other, ResponseFunctionToolCall)
    assert (other.name, other.namespace) == ("z", None)
    assert "About docs." in prompt
    done = [event.name for event in events if event.type == "response.function_call_arguments.done"]
    assert done == ["search", "z"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (call_text("apply_patch", patch="x"), '{"patch": "x"}'),
        (call_text("apply_patch", input=5), '{"input": 5}'),
        (call_text("apply_patch", input=PATCH)[:70], PATCH[:10]),
        ('<tool_call>{"name": "apply_patch", "arguments": {"inp', '{"inp'),
    ],
)
async def test_a_model_may_miss_the_form(script: str, said: str) -> None:
    """What it wrote instead reaches the client; of a text that is cut short, the part that is there."""
    (item,) = (await responded(script))[0].output
    assert isinstance(item, ResponseCustomToolCall)
    assert item.input.startswith(said) and (PATCH.startswith(item.input) or item.input == said)


async def test_calls_and_outputs_come_back_in_the_history() -> None:
    """The model sees an earlier call of a custom tool as the function's, and its output; ids are checked."""
    call = {"type": "custom_tool_call", "call_id": "c1", "name": "note", "namespace": "docs", "input": PATCH}
    output = {"type": "custom_tool_call_output", "call_id": "c1", "output": "Done!"}
    user = {"role": "user", "content": "Go."}
    _, _, prompt = await responded("ok", input=[user, {**call, "id": "ctc_1", "status": "completed"}, output])
    assert json.dumps(PATCH, ensure_ascii=False)[1:-1] in prompt
    assert "docs__note" in prompt and "Done!" in prompt
    async with open_stub(ScriptedRunner("ok"), stub_tokenizer(TEMPLATE)) as engine:
        app = create_app(engine, Config())
        for items, param in (
            ([user, output], "input[1].call_id"),
            ([user, {"type": "custom_tool_call", "call_id": "c", "name": "x"}], "input[1].input"),
        ):
            answer = await ask(app, "POST", "/v1/responses", {"input": items})
            assert (answer.status, answer.json()["error"]["param"]) == (400, param)


async def test_the_format_of_a_custom_tool_binds_or_is_named() -> None:
    """A regular expression holds the text; a Lark grammar is shown, and a Warning says that it does not hold."""
    async with open_stub(ScriptedRunner("no call"), stub_tokenizer(TEMPLATE)) as engine:
        app = create_app(engine, Config())
        regex = {"type": "grammar", "syntax": "regex", "definition": "[ab]{3}"}
        fields = {"input": "x", "tool_choice": {"type": "custom", "name": "apply_patch"}}
        answer = await ask(app, "POST", "/v1/responses", {**fields, "tools": [{**APPLY, "format": regex}]})
        (item,) = answer.json()["output"]
        assert item["type"] == "custom_tool_call" and set(item["input"]) <= {"a", "b"} and len(item["input"]) == 3
        assert "warning" not in answer.headers
        answer = await ask(app, "POST", "/v1/responses", {"input": "x", "tools": [{**APPLY, "format": LARK}]})
        assert "not held to it: apply_patch" in answer.headers["warning"]
        answer = await ask(
            app, "POST", "/v1/responses", {"input": "x", "tools": [{**APPLY, "format": {"type": "text"}}]}
        )
        assert (answer.status, "warning" in answer.headers) == (200, False)


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([{"type": "namespace", "name": "n", "tools": [SEARCH] * 513}], "at most 512"),
        ([{"type": "namespace", "name": "n", "tools": [SEARCH]}, {**SEARCH, "name": "n__search"}], "same name"),
        ([{"type": "namespace", "name": "n", "tools": [{"type": "web_search"}]}], "tools[0].tools[0].type"),
        ([{**APPLY, "format": {"type": "grammar", "syntax": "ebnf", "definition": "x"}}], "tools[0].format.syntax"),
        ([{"type": "custom", "name": "a b"}], "tools[0].name"),
    ],
)
async def test_tools_that_cannot_be_offered_are_refused_by_field(tools: list[Any], says: str) -> None:
    """The error names the field."""
    async with open_stub(ScriptedRunner("x"), stub_tokenizer(TEMPLATE)) as engine:
        answer = await ask(create_app(engine, Config()), "POST", "/v1/responses", {"input": "x", "tools": tools})
    assert answer.status == 400
    assert says in answer.json()["error"]["message"]
