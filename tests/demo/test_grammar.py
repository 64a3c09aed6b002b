"""The corpus is the same for the same seed, and is written exactly as the chat template writes chats."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tools.demo_model.corpus_grammar import END_OF_TEXT, IM_END, IM_START, call, corpus, messages_of, render, tool_chat
from tools.demo_model.questions import ADD_TOOL, COUNT, QUESTIONS, TOOL_QUESTIONS, WEATHER_TOOL
from trio_llm.demo import demo_model_path


def render_template(messages: list[dict[str, Any]], **variables: Any) -> str:
    """Render with the committed template, set up as transformers does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = json.loads((demo_model_path() / "tokenizer_config.json").read_text())["chat_template"]
    return environment.from_string(template).render(messages=messages, **variables)


CHAT = messages_of([("Hi", "Hello!"), ("Bye", "Goodbye!")])
WITH_RESULT = [*messages_of([("Add 1 and 2.", call("add", {"a": 1, "b": 2}))]), {"role": "tool", "content": "3"}]


@pytest.mark.parametrize("system", ["", "You are a helpful assistant."])
@pytest.mark.parametrize("tools", [[], [WEATHER_TOOL, ADD_TOOL]])
@pytest.mark.parametrize("chat", [CHAT, WITH_RESULT])
def test_render_equals_template(system: str, tools: list[dict[str, Any]], chat: list[dict[str, Any]]) -> None:
    """What the model was trained on is what a server renders, with and without system prompt, tools and results."""
    messages = [*messages_of([], system), *chat]
    assert render_template(messages, tools=tools or None) == render(messages, tools)
    assert render_template(messages, tools=tools, add_generation_prompt=True).endswith(f"{IM_START}assistant\n")


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_template_writes_openai_tool_calls(arguments: dict[str, str] | str) -> None:
    """A client that sends its tool call back, as JSON text or as an object, gives the text the model wrote."""
    function = {"name": "get_weather", "arguments": arguments}
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    written = render_template([{"role": "user", "content": "Weather in Paris?"}, message])
    assert written == render(messages_of([("Weather in Paris?", call("get_weather", {"city": "Paris"}))]))


def test_same_seed_same_corpus() -> None:
    """A seed fixes the corpus; another seed gives another one."""
    assert list(corpus(50, seed=1)) == list(corpus(50, seed=1)) != list(corpus(50, seed=2))


def test_corpus_has_all_sorts() -> None:
    """Chats, tool calls, plain texts and chats long enough to fill a window all occur; no text holds the end mark."""
    documents = list(corpus(400, seed=3))
    assert any("<tool_call>" in text and "<tool_response>" in text for text in documents)
    assert any(not text.startswith(IM_START) for text in documents)
    assert max(map(len, documents)) > 3000
    assert not any(END_OF_TEXT in text for text in documents)


def test_chats_are_well_formed() -> None:
    """Every mark that opens a turn is closed, also round tool calls."""
    random = Random(0)
    for _ in range(50):
        text = tool_chat(random)
        assert text.count(IM_START) == text.count(IM_END) > 2
        assert text.count("<tool_response>") == text.count("</tool_response>")


def test_questions_are_twenty_of_each() -> None:
    """Each topic asks twenty questions, that hold their answer nowhere but in the context where it must be found."""
    assert {len(questions) for questions in QUESTIONS.values()} == {COUNT} == {len(TOOL_QUESTIONS)}
    assert all(messages[-1]["role"] == "user" and answer for topic in QUESTIONS.values() for messages, answer in topic)
