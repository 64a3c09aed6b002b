"""Tools for models whose template knows none: described by a prompt of our own, in templates of every kind."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from tests.server.helpers import ask
from tests.server.stub import SPECIAL, StubRunner, open_stub, stub_tokenizer
from trio_llm.config import Config, ServerConfig
from trio_llm.server.app import create_app
from trio_llm.server.generation.tool_prompt import with_tools

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
# As strict as Llama 2's: no system, and roles alternate.
STRICT = """{% for m in messages %}{% set expected = ['user', 'assistant'][loop.index0 % 2] %}
{%- if m.role != expected %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"""


def test_calls_and_results_are_text() -> None:
    """Past calls and results are shown in the form that the prompt asks for; neighbours of one role are one turn."""
    turns = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": {}}}]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "user", "content": "and?"},
    ]
    first, call, result = with_tools(turns, [TOOL])
    assert first["content"].endswith("\n\n1+2?") and json.dumps(TOOL) in first["content"]
    assert call == {"role": "assistant", "content": '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'}
    assert result == {"role": "user", "content": "<tool_response>\n3\n</tool_response>\nand?"}


def test_messages_without_calls_and_results_stay_as_they_are() -> None:
    """A conversation without tools is shown as any server shows it: neighbours of one role stay two messages."""
    turns = [{"role": role, "content": role} for role in ("system", "user", "user", "assistant", "assistant", "user")]
    assert with_tools(turns, None) == turns


def test_a_system_message_comes_first() -> None:
    """Tools are described behind what the system says, and before all else where there is neither system nor user."""
    (system, _) = with_tools([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}], [TOOL])
    assert system["content"].startswith("Be brief.\n\nYou may call")
    (user, _) = with_tools([{"role": "assistant", "content": "hi"}], [TOOL])
    assert user["role"] == "user" and user["content"].startswith("You may call")


async def test_a_template_that_knows_no_tools_gets_them(caplog: pytest.LogCaptureFixture) -> None:
    """Over HTTP: the call is parsed, comes back and is shown; the log says that the prompt is ours."""
    tokenizer = stub_tokenizer(STRICT)
    reply = 'Hm.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    async with open_stub(StubRunner(reply=reply, tokenizer=tokenizer, max_model_len=4000), tokenizer) as engine:
        with caplog.at_level(logging.INFO):
            app = create_app(engine, Config())
        assert "--tool-prompt" in caplog.text
        turns: list[dict[str, Any]] = [{"role": "user", "content": f"1+2? {SPECIAL[2]}"}]
        body: dict[str, Any] = {"messages": turns, "tools": [TOOL], "max_tokens": 200, "return_prompt_text": True}
        answer = (await ask(app, "POST", "/v1/chat/completions", body)).json()
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert (call["function"]["name"], call["function"]["arguments"]) == ("add", '{"a": 1}')
        turns += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "3"},
        ]
        again = await ask(app, "POST", "/v1/chat/completions", body)
    assert again.status == 200
    assert "<tool_response>\n3\n</tool_response>" in again.json()["prompt_text"]


async def test_tools_can_be_refused_instead() -> None:
    """Without the setting, tools for a template that knows none are refused by name."""
    async with open_stub() as engine:
        app = create_app(engine, Config(server=ServerConfig(tool_prompt=False)))
        body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}
        answer = await ask(app, "POST", "/v1/chat/completions", body)
    assert (answer.status, answer.json()["error"]["param"]) == (400, "tools")
