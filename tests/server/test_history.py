"""Messages as templates take them: whatever a model wrote, cut or wrong, the conversation goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.helpers import ask
from tests.server.stub import StubRunner, open_stub, stub_tokenizer
from trio_llm.config import Config, LimitsConfig
from trio_llm.errors import InvalidRequestError
from trio_llm.server.app import create_app
from trio_llm.server.bodies.tools import CalledFunction, ToolCall
from trio_llm.server.bodies.types import Message
from trio_llm.server.generation.history import history, new_call_id
from trio_llm.server.parsing.readable_json import readable_object

LIMITS = LimitsConfig()
LEAF = st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5)
VALUE = st.recursive(
    LEAF, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=6
)
OBJECT = st.dictionaries(st.text(max_size=3), VALUE, max_size=3)


@given(OBJECT, st.booleans(), st.data())
def test_cut_arguments_are_read_as_far_as_they_were_written(whole: dict[str, Any], ascii: bool, data: Any) -> None:
    """An object cut anywhere gives keys and values that it began with; a whole one gives itself."""
    text = json.dumps(whole, ensure_ascii=ascii)
    assert readable_object(text, LIMITS) == (whole, True)
    cut = text[: data.draw(st.integers(1, len(text) - 1))]
    read, is_whole = readable_object(cut, LIMITS)
    assert not is_whole
    assert list(read) == list(whole)[: len(read)]
    assert all(read[key] == whole[key] for key in list(read)[:-1])  # Only the last one may be cut.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ('{"a": "x', {"a": "x"}),
        ('{"a": "x\\', {"a": "x"}),
        ('{"a": "\\u00', {"a": ""}),
        ('{"a": "\\ud83d', {"a": "\ufffd"}),
        ('{"a": [1, {"b": tru', {"a": [1, {}]}),
        ('{"a": 1 "b": 2}', {"a": 1}),
        ('{"a": 1}}', {"a": 1}),
        ("{'a': 1}", {}),
        ("[1]", {}),
        ("null", {}),
        ("not JSON", {}),
        ('{"a": ' + "1" * 5000 + "}", {}),
    ],
)
def test_what_goes_wrong_is_left_out(text: str, expected: dict[str, Any]) -> None:
    """Broken escapes, half surrogate pairs, missing commas and other JSON leave what came before them."""
    assert readable_object(text, LIMITS)[0] == expected


def test_deep_nesting_is_refused_by_name() -> None:
    """Arguments nested 500 deep are a 400 that names the field and the limit, whole or cut."""
    for text in ('{"a": ' + "[" * 500 + "]" * 500 + "}", '{"a": ' + "[" * 500):
        call = ToolCall(function=CalledFunction(name="f", arguments=text))
        with pytest.raises(InvalidRequestError, match=r"nested too deeply: at most 32") as caught:
            history([Message(role="assistant", tool_calls=[call])], "hermes", LIMITS)
        assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


def test_ids_that_mistral_refuses_are_mapped() -> None:
    """Mistral's templates take nine letters and digits: others' ids are mapped, a call's and its result's alike."""
    call = ToolCall(id="call_0123456789abcdef", function=CalledFunction(name="f"))
    turns = [
        Message(role="assistant", tool_calls=[call]),
        Message(role="tool", content="2", tool_call_id="call_0123456789abcdef"),
    ]
    assistant, tool = history(turns, "mistral", LIMITS).messages
    assert assistant["tool_calls"][0]["id"] == tool["tool_call_id"] != call.id
    assert len(tool["tool_call_id"]) == 9 and tool["tool_call_id"].isalnum()
    assert history(turns, "hermes", LIMITS).messages[1]["tool_call_id"] == call.id
    kept = new_call_id("mistral")
    (message,) = history([Message(role="tool", content="2", tool_call_id=kept)], "mistral", LIMITS).messages
    assert message["tool_call_id"] == kept


MISTRAL = """{% for m in messages %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception("id") }}
{% endif %}[TOOL_CALLS][{{ c.function | tojson }}]{% endfor %}{% if m.tool_call_id is defined and
m.tool_call_id | length != 9 %}{{ raise_exception("id") }}{% endif %}{{ m.content }}{% endfor %}"""
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(
    "reply", ['[TOOL_CALLS] [{"name": "f", "arguments": {}}]', '[TOOL_CALLS] [{"name": "f", "arguments": {"a']
)
async def test_a_call_that_the_server_named_may_come_back(reply: str) -> None:
    """The second turn of a conversation with a call, whole or cut, is accepted by the model's own template."""
    tokenizer = stub_tokenizer(MISTRAL)
    async with open_stub(StubRunner(reply=reply, tokenizer=tokenizer, max_model_len=2000), tokenizer) as engine:
        app = create_app(engine, Config())
        turns: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
        answer = await ask(app, "POST", "/v1/chat/completions", {"messages": turns, "tools": TOOLS, "max_tokens": 60})
        (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
        turns += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "2"},
        ]
        again = await ask(app, "POST", "/v1/chat/completions", {"messages": turns, "tools": TOOLS, "max_tokens": 1})
    assert again.status == 200
    assert ("warning" in again.headers) == (call["function"]["arguments"] != "{}")
