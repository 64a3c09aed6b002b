"""Truncation of /v1/responses, and items of other servers in its history and that of /v1/messages."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.helpers import ask
from tests.server.scripted import TEMPLATE, ScriptedRunner
from tests.server.stub import open_stub, stub_tokenizer
from trio_llm.config import Config
from trio_llm.server.app import create_app


def turns(count: int) -> list[dict[str, Any]]:
    """Return turns of a user, each with a call, its result and an answer; the last without."""
    items: list[dict[str, Any]] = []
    for index in range(count):
        call = {"type": "function_call", "call_id": f"c{index}", "name": "f", "arguments": "{}"}
        items += [
            {"role": "user", "content": f"question {index} " + "x" * 60},
            call,
            {"type": "function_call_output", "call_id": f"c{index}", "output": f"result {index}"},
            {"role": "assistant", "content": f"answer {index}"},
        ]
    return [*items, {"role": "user", "content": "question last"}]


async def responded(path: str = "/v1/responses", **fields: Any) -> tuple[Any, str]:
    """Return the answer of a model of a small context, and the prompt that it got."""
    runner = ScriptedRunner("ok", max_model_len=512)
    async with open_stub(runner, stub_tokenizer(TEMPLATE)) as engine:
        answer = await ask(create_app(engine, Config()), "POST", path, fields)
    return answer, runner.prompts[0] if runner.prompts else ""


@pytest.mark.parametrize("room", [1, 200])
async def test_the_oldest_turns_are_left_out(room: int) -> None:
    """As few whole turns as make room for the answer; instructions stay, no result loses its call."""
    fields = {"input": turns(20), "instructions": "Be brief.", "max_output_tokens": room}
    answer, _ = await responded(**fields)
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    answer, prompt = await responded(**fields, truncation="auto")
    assert answer.status == 200, answer.body
    assert answer.json()["truncation"] == "auto"
    kept = [index for index in range(20) if f"question {index} " in prompt]
    assert kept == list(range(20 - len(kept), 20)) and 0 < len(kept) < 20
    assert [index for index in range(20) if f"result {index}<" in prompt] == kept
    assert "Be brief." in prompt and "question last" in prompt
    assert f"oldest {20 - len(kept)} of 21 turns" in answer.headers["warning"]
    # One turn more does not fit.
    fields["input"] = turns(20)[4 * (19 - len(kept)) :]
    answer, _ = await responded(**fields, truncation="auto")
    assert f"oldest 1 of {len(kept) + 2} turns" in answer.headers["warning"]


async def test_what_fits_is_not_cut_and_what_cannot_fit_is_refused() -> None:
    """A conversation that fits stays whole, with no warning; a last turn that is too long is the same error as ever."""
    answer, prompt = await responded(input=turns(1), truncation="auto")
    assert "question 0" in prompt and "warning" not in answer.headers
    assert answer.json()["truncation"] == "auto"
    answer, _ = await responded(input=[*turns(1), {"role": "user", "content": "x" * 4000}], truncation="auto")
    assert (answer.status, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    answer, _ = await responded(input="x" * 4000, truncation="auto")
    assert (answer.status, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert (await responded(input="x"))[0].json()["truncation"] == "disabled"


async def test_searches_of_other_servers_are_hints() -> None:
    """An answer of another server comes back with its searches: the model goes on without them, a Warning says."""
    search = {
        "type": "web_search_call",
        "id": "ws_1",
        "status": "completed",
        "action": {"type": "search", "query": "x"},
    }
    listed = {"type": "mcp_list_tools", "id": "m", "server_label": "s", "tools": [{"name": "t", "input_schema": {}}]}
    said = {"role": "assistant", "content": "It rains."}
    user = {"role": "user", "content": "Go."}
    answer, prompt = await responded(input=[user, listed, search, said, user])
    assert answer.status == 200, answer.body
    assert "It rains." in prompt and "ws_1" not in prompt
    assert "input[2].action" in answer.headers["warning"]
    blocks = [
        {"type": "server_tool_use", "id": "srv", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "srv", "content": [{"type": "web_search_result"}]},
        {"type": "text", "text": "It rains.", "citations": [{"type": "web_search_result_location", "url": "u"}]},
    ]
    messages = [user, {"role": "assistant", "content": blocks}, user]
    answer, prompt = await responded("/v1/messages", messages=messages, max_tokens=4)
    assert answer.status == 200, answer.body
    assert "It rains." in prompt and "srv" not in prompt
    assert "messages[1].content[1].content" in answer.headers["warning"]


@pytest.mark.parametrize("kind", ["compaction", "item_reference", "code_interpreter_call", "mcp_call"])
async def test_what_the_next_turns_build_on_is_refused_by_name(kind: str) -> None:
    """A summary, a stored item or a result that cannot be read would be missing from the answer."""
    answer, _ = await responded(input=[{"type": kind, "id": "x"}, {"role": "user", "content": "Go."}])
    assert (answer.status, answer.json()["error"]["param"]) == (400, "input[0].type")
    assert kind in answer.json()["error"]["message"]
