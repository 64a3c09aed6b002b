"""On every route, what is streamed is what is answered whole: the same request, the same seed, the demo model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server import joined
from tests.server.helpers import Answer, ask
from trio_llm.assemble import open_engine
from trio_llm.config import AuthConfig, Config, EngineConfig
from trio_llm.server.app import ServerApp, create_app

DICE = {"temperature": 0.9, "seed": 7}
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CHAT_TOOL = {"type": "function", "function": TOOL}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TEXT = {"prompt": "Once upon a time", "max_tokens": 40}

COMPLETIONS: list[dict[str, Any]] = [
    {},
    {"echo": True},
    {"echo": True, "logprobs": 2, "n": 2},
    {"n": 3, "logprobs": 0},
    {"prompt": ["Once upon a time", "The little owl"], "n": 2},
    {"stop": ["e ", "the"]},
    {"stop": ["and", " a"], "include_stop_str_in_output": True, "min_tokens": 5},
    {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1},
    {"structured_outputs": {"regex": "[a-z]{3,9} [0-9]+"}},
    {"repetition_penalty": 0.5, "repetition_detection": {"max_pattern_size": 4, "min_count": 3}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
]
CHATS: list[dict[str, Any]] = [
    {},
    {"n": 3, "logprobs": True, "top_logprobs": 2},
    {"stop": ["the", "is"]},
    {"tools": [CHAT_TOOL], "temperature": 0},
    {"tools": [CHAT_TOOL], "tool_choice": "required", "n": 2},
    {"tools": [CHAT_TOOL], "response_format": AS_JSON},
    {"response_format": AS_JSON, "n": 2},
    {"messages": [*QUESTION, {"role": "assistant", "content": "It is"}], "echo": True,
     "continue_final_message": True, "add_generation_prompt": False},
]  # fmt: skip
RESPONSES: list[dict[str, Any]] = [
    {},
    {"tools": [{"type": "function", **TOOL}]},
    {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
]
MESSAGES: list[dict[str, Any]] = [
    {},
    {"stop_sequences": ["i", "a"]},
    {"tools": [{"name": "get_weather", "input_schema": TOOL["parameters"]}]},
]


@pytest.fixture
async def app() -> AsyncIterator[ServerApp]:
    """Return an app round the demo model."""
    config = Config(engine=EngineConfig(dtype="float32"), auth=AuthConfig(rate_limit_requests=0))
    async with open_engine(config) as engine:
        yield create_app(engine, config)


async def both(app: ServerApp, path: str, body: dict[str, Any]) -> tuple[Any, Answer]:
    """Return a whole answer and a stream."""
    plain = {name: value for name, value in body.items() if name != "stream_options"}
    whole, stream = await ask(app, "POST", path, plain), await ask(app, "POST", path, {**body, "stream": True})
    assert (whole.status, stream.status) == (200, 200), (whole.body, stream.body)
    return whole.json(), stream


def typed_events(answer: Answer) -> list[dict[str, Any]]:
    """Return the data of events that have types."""
    return [json.loads(part.partition("data: ")[2]) for part in answer.body.decode().split("\n\n") if part]


async def test_completions(app: ServerApp) -> None:
    """Texts, ids, log-probabilities, reasons and counts of every choice add up to the whole answer's."""
    for case in COMPLETIONS:
        whole, stream = await both(app, "/v1/completions", {**TEXT, **DICE, **case})
        *chunks, _ = stream.events()
        for expected in whole["choices"]:
            parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
            told = {**parts[-1], "text": "".join(part["text"] for part in parts)}
            for name in ("token_ids", "prompt_token_ids"):
                if name in expected:
                    told[name] = [token for part in parts for token in part.get(name, ())]
            if expected["logprobs"] is not None:
                columns = [part["logprobs"] for part in parts]
                told["logprobs"] = {key: [x for column in columns for x in column[key]] for key in columns[0]}
            assert told == expected, case
        if "stream_options" in case:
            assert chunks[-1]["usage"] == {
                **whole["usage"],
                "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"],
            }


async def test_chats(app: ServerApp) -> None:
    """Content, calls, log-probabilities and reasons of every choice add up to the whole answer's."""
    called = False
    for case in CHATS:
        whole, stream = await both(
            app, "/v1/chat/completions", {"messages": QUESTION, "max_tokens": 60, **DICE, **case}
        )
        said = joined.whole(whole)
        assert joined.streamed(stream.events()) == said, case
        called = called or any(one.calls for one in said)
    assert called


async def test_responses(app: ServerApp) -> None:
    """A stream's last event holds the whole response, and its deltas are that response's texts and arguments."""
    for case in RESPONSES:
        body = {
            "model": "trio-llm-demo",
            "input": QUESTION[0]["content"],
            "max_output_tokens": 60,
            "temperature": 0,
            **case,
        }
        whole, stream = await both(app, "/v1/responses", body)
        events = typed_events(stream)
        outputs = [[_shown(item) for item in said["output"]] for said in (whole, events[-1]["response"])]
        assert outputs[0] == outputs[1], case
        deltas = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
        assert deltas == "".join(text for _, text in outputs[0]), case
        assert events[-1]["response"]["status"] == whole["status"]


async def test_messages(app: ServerApp) -> None:
    """A stream's deltas are the whole message's blocks, and it ends for the same reason."""
    for case in MESSAGES:
        body = {"messages": QUESTION, "max_tokens": 60, "temperature": 0, **case}
        whole, stream = await both(app, "/v1/messages", body)
        told: list[list[str]] = []
        for event in typed_events(stream):
            if event["type"] == "content_block_start":
                told.append([event["content_block"]["type"], ""])
            elif event["type"] == "content_block_delta":
                told[event["index"]][1] += event["delta"].get("text") or event["delta"].get("partial_json") or ""
            elif event["type"] == "message_delta":
                assert event["delta"]["stop_reason"] == whole["stop_reason"], case
        blocks = [[block["type"], block.get("text", block.get("input"))] for block in whole["content"]]
        assert [[kind, json.loads(text) if kind == "tool_use" else text] for kind, text in told] == blocks, case


def _shown(item: dict[str, Any]) -> tuple[str, str]:
    return item["type"], item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
