"""Fields that nobody knows: named wherever they stand, with the path by which a client finds them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.helpers import ask
from tests.server.stub import StubRunner, open_stub
from trio_llm.config import Config, LimitsConfig
from trio_llm.errors import InvalidRequestError
from trio_llm.server.anthropic.body import MessagesBody
from trio_llm.server.app import create_app
from trio_llm.server.batches.service import execute_line
from trio_llm.server.bodies.pipeline import parse_body
from trio_llm.server.bodies.types import ChatBody, CompletionBody
from trio_llm.server.bodies.unknown_fields import extra_fields
from trio_llm.server.openai.responses_body import ResponsesBody

HI = {"role": "user", "content": "hi"}
FUNCTION = {"name": "f", "parameters": {"type": "object", "anything": {"goes": 1}}}


@pytest.mark.parametrize(
    ("kind", "body", "paths"),
    [
        (ChatBody, {"messages": [HI]}, []),
        (ChatBody, {"messages": [HI], "foo": 1, "bar": None}, ["foo"]),
        (ChatBody, {"messages": [HI, {**HI, "foo": 1, "bar": None}]}, ["messages[1].foo"]),
        (ChatBody, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "foo": 1}]}]},
         ["messages[0].content[0].foo"]),
        (ChatBody, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "foo": 1}}]}]},
         ["messages[0].tool_calls[0].function.foo"]),
        (ChatBody, {"messages": [HI], "tools": [{"function": {**FUNCTION, "foo": 1}, "bar": 2}]},
         ["tools[0].bar", "tools[0].function.foo"]),
        (ChatBody, {"messages": [HI], "tool_choice": {"type": "function", "function": {"name": "f", "foo": 1}}},
         ["tool_choice.function.foo"]),
        (ChatBody, {"messages": [HI], "response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"anything": 1}, "foo": 1}}}, ["response_format.json_schema.foo"]),
        (CompletionBody, {"prompt": "x", "stream": True, "stream_options": {"include_usage": True, "foo": 1}},
         ["stream_options.foo"]),
        (CompletionBody, {"prompt": "x", "structured_outputs": {"choice": ["a"], "foo": 1}},
         ["structured_outputs.foo"]),
        (MessagesBody, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "foo": 1}]}]},
         ["messages[0].content[0].foo"]),
        (MessagesBody, {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x",
            "content": [{"type": "text", "text": "a", "foo": 1}], "text": "not here"}]}]},
         ["messages[0].content[0].text", "messages[0].content[0].content[0].foo"]),
        (ResponsesBody, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "foo": 1}]}]},
         ["input[0].content[0].foo"]),
    ],
)  # fmt: skip
def test_the_path_of_an_unknown_field(kind: Any, body: dict[str, Any], paths: list[str]) -> None:
    """Every object of a body is looked at, whichever of several types it is of; what is free stays free."""
    assert [extra.path for extra in extra_fields(body, kind, {})] == paths


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages[0].audio"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
        ({"structured_outputs": {"choice": ["a"], "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"choice": ["a"], "disable_additional_properties": True}},
         "structured_outputs.disable_additional_properties"),
    ],
)  # fmt: skip
def test_what_is_known_and_not_built_is_refused_inside_too(fields: dict[str, Any], path: str) -> None:
    """A nested field that would change the answer is refused by its path; with the value of none it passes."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(json.dumps({"messages": [HI], **fields}).encode(), ChatBody, LimitsConfig())
    assert caught.value.param == path
    neutral = {"role": "assistant", "content": "x", "audio": None, "annotations": []}
    assert extra_fields({"messages": [neutral]}, ChatBody, {}) == ()


IMAGE = {"url": "data:image/png;base64,AA=="}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions",
         {"messages": [{**HI, "foo": 1, "content": [{"type": "text", "text": "a"},
                                                    {"type": "image_url", "image_url": IMAGE}]}]},
         "messages[0].content[1]"),
        ("/v1/chat/completions", {"messages": [{**HI, "content": [{"type": "input_audio", "input_audio": {}}]}]},
         "messages[0].content[0]"),
        ("/v1/responses", {"input": [{**HI, "content": [{"type": "input_image", "image_url": "data:"}]}]},
         "input[0].content[0]"),
        ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "c",
                                      "output": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].output[0]"),
    ],
)  # fmt: skip
async def test_a_part_that_is_no_text_is_the_fault_not_its_fields(
    path: str, body: dict[str, Any], param: str, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused image is named where it stands, and nothing says before that its data was ignored."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config(limits=LimitsConfig(strict=strict)))
        with caplog.at_level("INFO"):
            answer = await ask(app, "POST", path, {"model": app.services.names[0], **body})
    assert (answer.status, answer.json()["error"]["param"]) == (400, param)
    assert "warning" not in answer.headers and "gnored" not in caplog.text


@pytest.mark.parametrize("tag", [["function"], {"a": 1}, 1, None])
@pytest.mark.parametrize("path", ["tools", "tool_choice"])
def test_a_type_that_is_no_text_is_refused(path: str, tag: object) -> None:
    """A list or an object cannot even be looked up among the types that there are."""
    value = {"type": tag, "name": "a"}
    body = {"input": "a", path: [value] if path == "tools" else value}
    with pytest.raises(InvalidRequestError):
        parse_body(json.dumps(body).encode(), ResponsesBody, LimitsConfig())


async def test_the_client_is_told_of_the_path() -> None:
    """The Warning header names the path of a nested field."""
    async with open_stub(StubRunner()) as engine:
        body = {"messages": [{**HI, "foo": 1}], "max_tokens": 1}
        answer = await ask(create_app(engine, Config()), "POST", "/v1/chat/completions", body)
    assert answer.status == 200
    assert answer.headers["warning"] == '299 trio-llm "Ignored unknown fields: messages[0].foo"'


async def test_in_strict_mode_the_path_is_refused() -> None:
    """With --strict a field that nobody knows is a 400 that names its path."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config(limits=LimitsConfig(strict=True)))
        answer = await ask(app, "POST", "/v1/chat/completions", {"messages": [HI, {**HI, "foo": 1}]})
    assert (answer.status, answer.json()["error"]["param"]) == (400, "messages[1].foo")


async def test_lines_of_batches_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for the answer to a line of a batch: the log names its unknown fields."""
    async with open_stub(StubRunner()) as engine:
        services = create_app(engine, Config()).services
        with caplog.at_level("INFO"):
            body = {"messages": [{**HI, "f\no": 1}], "max_tokens": 1}
            await execute_line(services, "/v1/chat/completions", json.dumps({"body": body}).encode(), "")
    assert "'messages[0].f\\no'" in caplog.text


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("temprature", "temperature"),
        ("topP", "top_p"),
        ("max-tokens", "max_tokens"),
        ("maxCompletionTokens", "max_completion_tokens"),
        ("frequence_penalty", "frequency_penalty"),
        ("stop_sequences", "stop"),
        ("max_new_tokens", "max_tokens"),
        ("enable_thinking", "chat_template_kwargs"),
        ("foo", None),
        ("x" * 5000, None),
    ],
)
async def test_a_field_that_is_misspelt_is_named_beside_the_one_that_was_meant(field: str, meant: str | None) -> None:
    """The warning, and with --strict the error, say which field it is probably."""
    body = {"messages": [HI], "max_tokens": 1, field: 0}
    for strict in (False, True):
        async with open_stub(StubRunner()) as engine:
            app = create_app(engine, Config(limits=LimitsConfig(strict=strict)))
            answer = await ask(app, "POST", "/v1/chat/completions", {"model": "stub", **body})
        said = answer.json()["error"]["message"] if strict else answer.headers["warning"]
        assert answer.status == (400 if strict else 200)
        assert ("did you mean" in said) == (meant is not None)
        assert meant is None or meant in said.partition("did you mean")[2]
