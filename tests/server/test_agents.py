"""Coding agents work unchanged: what they send with every request is answered, and Warnings name what has no effect."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.server.helpers import Answer, ask
from tests.server.scripted import MODEL, PLAIN_TEMPLATE, TEMPLATE, ScriptedRunner, call_text
from tests.server.stub import open_stub, stub_tokenizer
from trio_llm.config import Config, LimitsConfig, ServerConfig
from trio_llm.server.app import ServerApp, create_app

RECORDED = Path(__file__).with_name("recorded")
CLAUDE: dict[str, Any] = json.loads((RECORDED / "claude_code.json").read_text())
CODEX: dict[str, Any] = json.loads((RECORDED / "codex.json").read_text())
SHOWS_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,context-management-2025-06-27,interleaved-thinking-2025-05-14",
    "x-api-key": "none",
}


@attrs.define
class Agents:
    """An app round a scripted model."""

    app: ServerApp
    runner: ScriptedRunner

    async def claude(self, **fields: Any) -> Answer:
        return await ask(self.app, "POST", "/v1/messages?beta=true", {**CLAUDE, **fields}, headers=HEADERS)

    async def codex(self, **fields: Any) -> Answer:
        return await ask(self.app, "POST", "/v1/responses", {**CODEX, **fields})


@pytest.fixture(params=[TEMPLATE, SHOWS_TOOLS + PLAIN_TEMPLATE], ids=["thinks", "plain"])
async def agents(request: pytest.FixtureRequest) -> AsyncIterator[Agents]:
    """Serve a model that thinks and one that does not, in strict mode: agents send nothing that is unknown."""
    runner = ScriptedRunner(call_text("Bash", command="ls"), max_model_len=131072)
    config = Config(limits=LimitsConfig(strict=True), server=ServerConfig(served_model_name=(MODEL,)))
    async with open_stub(runner, stub_tokenizer(request.param), num_kv_blocks=8193) as engine:
        yield Agents(create_app(engine, config), runner)


def events(answer: Answer) -> list[dict[str, Any]]:
    """Parse the events of a stream whose events have names."""
    assert answer.status == 200, answer.body
    return [json.loads(part.split("data: ", 1)[1]) for part in answer.body.decode().split("\n\n")[:-1]]


async def test_claude_code(agents: Agents) -> None:
    """A recorded turn of Claude Code is answered by a call of its tool, and the model sees the whole conversation."""
    answer = await agents.claude()
    kinds = [event["type"] for event in events(answer)]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    (block,) = [event["content_block"] for event in events(answer) if event["type"] == "content_block_start"]
    assert (block["type"], block["name"]) == ("tool_use", "Bash")
    warning = answer.headers["warning"]
    assert "Ignored hints: context_management, messages[1].content[1].data, tools[4].defer_loading" in warning
    assert "Dropped tools that this server cannot run: tools[5].type=web_search_20250305" in warning
    prompt = agents.runner.prompts[-1]
    for text in (
        "Claude Code",
        "pytest -q",
        "Error:\n1 failed",
        "return 1\nEdit",
        "Go on.",
        CLAUDE["tools"][4]["name"],
    ):
        assert text in prompt
    assert "web_search" not in prompt
    assert "EmwKAhgB" not in prompt


async def test_claude_code_counts_tokens(agents: Agents) -> None:
    """The same conversation is counted; nothing in it is refused there either."""
    body = {name: value for name, value in CLAUDE.items() if name not in ("max_tokens", "stream", "temperature")}
    del body["metadata"]
    counted = await ask(agents.app, "POST", "/v1/messages/count_tokens", body, headers=HEADERS)
    assert counted.status == 200, counted.body
    assert counted.json()["input_tokens"] > 2000


async def test_codex(agents: Agents) -> None:
    """A recorded turn of Codex is answered by a call of its shell; only tools that are OpenAI's own are left out."""
    agents.runner.say(call_text("shell_command", command="ls"))
    answer = await agents.codex()
    kinds = [event["type"] for event in events(answer)]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    (item,) = events(answer)[-1]["response"]["output"]
    assert (item["type"], item["name"]) == ("function_call", "shell_command")
    warning = answer.headers["warning"]
    for named in ("service_tier", "text.verbosity", "input[4].encrypted_content", "input[5].phase"):
        assert named in warning
    dropped = "tools[3].type=web_search, tools[4].type=local_shell"
    assert f"Dropped tools that this server cannot run: {dropped}" in warning
    prompt = agents.runner.prompts[-1]
    for text in (
        "You are Codex",
        "<cwd>/work</cwd>",
        "Listing them.",
        "a.py",
        "update_plan",
        "*** Begin Patch",
        "mcp__docs__search",
    ):
        assert text in prompt
    assert "not held to it: apply_patch" in warning
    assert "web_search" not in prompt
    assert "gAAAAABpJ0xk" not in prompt


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"thinking": {"type": "adaptive"}}, ""),
        ({"thinking": {"type": "enabled", "budget_tokens": 300}}, ""),
        ({"thinking": {"type": "disabled"}}, ""),
        ({"thinking": None, "output_config": None}, ""),
        ({"output_config": {"effort": "max"}}, "output_config.effort"),
        ({"service_tier": "priority", "speed": "fast"}, "service_tier, speed"),
        ({"mcp_servers": [{"type": "url", "name": "x", "url": "https://x"}]}, "mcp_servers"),
        ({"tools": [{**CLAUDE["tools"][0], "name": "m" * 128}]}, ""),
        ({"tools": [{**CLAUDE["tools"][1], "name": f"mcp__s__t{i}", "description": ""} for i in range(200)]}, ""),
        ({"tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "tools": CLAUDE["tools"][:1]}, ""),
        ({"tools": CLAUDE["tools"][5:], "tool_choice": {"type": "auto"}}, "tools[0].type=web_search_20250305"),
    ],
)
async def test_variations_of_claude_code(agents: Agents, fields: dict[str, Any], warning: str) -> None:
    """Hints are accepted by any model; names of 128 characters and 200 tools are not too many."""
    answer = await agents.claude(messages=[{"role": "user", "content": "hi"}], max_tokens=40, **fields)
    assert answer.status == 200, answer.body
    assert warning in answer.headers["warning"]


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"reasoning": None}, ""),
        ({"reasoning": {"effort": "high", "summary": "detailed"}}, "reasoning.summary"),
        ({"text": None}, ""),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"include": ["reasoning.encrypted_content", "web_search_call.action.sources"]}, "no encrypted_content"),
        ({"tools": CODEX["tools"][2:]}, "tools[1].type=web_search"),
        ({"tools": [{**CODEX["tools"][0], "name": "m" * 128}]}, ""),
        ({"tools": [{**CODEX["tools"][1], "name": f"t{i}"} for i in range(200)]}, ""),
    ],
)
async def test_variations_of_codex(agents: Agents, fields: dict[str, Any], warning: str) -> None:
    """The same holds for Codex."""
    answer = await agents.codex(max_output_tokens=16, **fields)
    assert events(answer)[-1]["type"] in ("response.completed", "response.incomplete")
    assert warning in answer.headers["warning"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": CODEX["tools"][3:5], "tool_choice": "required"}, "tool_choice"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"input": [{"type": "item_reference", "id": "rs_1"}]}, "input[0].type"),
        ({"model": None}, "model"),
    ],
)
async def test_what_changes_the_meaning_is_refused(agents: Agents, fields: dict[str, Any], param: str) -> None:
    """A hint may be ignored; what would give another answer than the one asked for may not."""
    answer = await agents.codex(**fields)
    assert (answer.status, answer.json()["error"]["param"]) == (400, param)


async def test_many_warnings_are_few_headers(agents: Agents) -> None:
    """A conversation with hundreds of hints has one Warning header for them, of bounded length."""
    turns = [{"role": "assistant", "content": "x", "phase": "commentary"}] * 300
    answer = await agents.codex(input=[*turns, {"role": "user", "content": "hi"}], max_output_tokens=4)
    assert answer.status == 200
    assert "and 292 more" in answer.headers["warning"]
    assert len(answer.headers["warning"]) < 2000
