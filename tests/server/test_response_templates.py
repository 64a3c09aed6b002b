"""Response templates: answers read as tokenizer_config.json declares, held to transformers' own parser."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from transformers.utils.chat_parsing import parse_response

from tests.server.helpers import ask, function
from tests.server.joined import streamed, whole
from tests.server.stub import StubRunner, open_stub, stub_tokenizer
from trio_llm.config import Config
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Reasoning
from trio_llm.server.parsing.response_parser import ResponseParser, ResponseStyle
from trio_llm.server.parsing.response_template import ResponseTemplate, TemplateError

NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
THINK: dict[str, Any] = {"open": "<think>", "close": "</think>"}
JSON_CALLS = {
    "open": "<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json",
    "transform": {"type": "function", "function": "{content}"},
}  # fmt: skip
TAG = r"<parameter=(?P<key>\w+)>\s*(?P<value>.*?)\s*</parameter>"


def spec(start: str | list[str] = "<assistant>", **fields: dict[str, Any]) -> dict[str, Any]:
    """Return a template."""
    return {"defaults": {"role": "assistant"}, "start_anchor": start, "fields": fields}


# After the examples of transformers' documentation: one per way to write calls.
SPECS = {
    "json": spec(thinking=THINK, tool_calls=JSON_CALLS, content={"close": "<|im_end|>"}),
    "list": spec(
        content={"open": "<say>", "close": "</say>"},
        thinking=THINK,
        tool_calls={
            "open": "<act>", "close": "</act>", "content": "json", "transform_each": True,
            "transform": {"type": "function", "function": {"name": "{tool_name}", "arguments": "{parameters}"}},
        },
    ),
    "channels": spec(
        thinking={"open": "<|channel|>analysis<|message|>", "close": "<|end|>"},
        content={"open": "<|channel|>final<|message|>", "close": "<|end|>"},
        tool_calls={
            "open_pattern": r"<\|channel\|>commentary to=functions\.(?P<name>\w+).*?<\|message\|>",
            "close": "<|call|>", "repeats": True, "content": "json", "transform": NAMED,
        },
    ),
    "begun": spec(
        thinking={"open_pattern": r"(?:^|<think>\s*)", "close": "</think>"},
        content={"open": "<response>\n", "close_pattern": r"\n?</response>"},
        tool_calls=JSON_CALLS,
    ),
    "tags": spec(
        thinking=THINK,
        tool_calls={
            "open_pattern": r"<tool_call>\s*<function=(?P<name>\w+)>", "close": "</tool_call>", "repeats": True,
            "content": "xml-inline", "content_args": {"tag_pattern": TAG, "merge_duplicates": True}, "transform": NAMED,
        },
        content={"close": ["<|im_end|>", "<|im_end|>\n"]},
    ),
    "quotes": spec(
        ["<|turn>model\n", "<tool_response|>"],
        thinking={"open": "<|channel>thought\n", "close": "<channel|>"},
        tool_calls={
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)", "close": "<tool_call|>", "repeats": True,
            "content": "json", "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": NAMED,
        },
        content={"close": ["<turn|>", "<|tool_response>"]},
    ),
    "blocks": spec(
        thinking={"open_pattern": "(?:<m>)?[^<]*<think>", "close": "<end>", "repeats": True, "join": "",
                  "content_args": {"strip": False}},
        content={"open_pattern": "(?:<m>)?[^<]*<text>", "close": "<end>", "repeats": True, "join": "",
                 "content_args": {"strip": False}},
        tool_calls={
            "open_pattern": "(?:<m>)?[^<]*<call>", "close": "<end>", "repeats": True, "content": "json",
            "transform": {"function": {"name": "{content.name}", "arguments": "{content.args}"}},
        },
    ),
    "lines": spec(
        content={},
        tool_calls={
            "open_pattern": r"\[call (?P<name>\w+)\]\n", "close": "[end]", "repeats": True, "content": "kv-lines",
            "content_args": {"value_parser": {"name": "json", "args": {"allow_non_json": True}}}, "transform": NAMED,
        },
    ),
}  # fmt: skip
EXAMPLES = [
    ("json", "", "<think>\nOkay <b>\n</think>\n\n"
                 '<tool_call>{"name": "f", "arguments": {"a": "</tool_cal"}}</tool_call>'),
    ("json", "<assistant>x</s><assistant><think>\n", " Hm\n</think>\n Some content.\n\n It ends. \n"),
    ("json", "", "Only text, and a <tool_ca"),
    ("list", "", '<think>I call.</think><act>[{"tool_name": "f", "parameters": {"a": 1}}, {"tool_name": "g", '
                 '"parameters": {}}]</act><eot>'),
    ("list", "<assistant><say>", "Hi there.</say>"),
    ("channels", "", "<|channel|>analysis<|message|>We do.\n\nSo.<|end|><|start|>assistant<|channel|>commentary "
                     'to=functions.f <|constrain|>json<|message|>{\n  "a": "SF, CA"\n}'),
    ("channels", "", "<|channel|>analysis<|message|>2+2<|end|><|start|>assistant<|channel|>final<|message|>4"),
    ("begun", "", 'Let me.\n\nOk.\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n</s>'),
    ("begun", "", "Hm.</think><response>\nHello!\nYou?\n</response>\n"),
    ("tags", "", "<tool_call>\n<function=f>\n<parameter=a>\n[1, 2]\n</parameter>\n<parameter=b>\n05\n</parameter>\n"
                 "<parameter=b>\nx\n</parameter>\n</function>\n</tool_call>"),
    ("quotes", "", "<|channel>thought\nCheck.<channel|><|tool_call>call:f{b:true,l:[<|\"|>x, {y<|\"|>],n:null,"
                   's:<|"|>f"o<|"|>,st:{k:<|"|>v: 1<|"|>}}<tool_call|><|tool_response>'),
    ("quotes", "<|turn>model\n", "Hi.<turn|>"),
    ("blocks", "<assistant>", '<think>One.<end><m><think> Two.<end><m>to<text>Now. <end><m>f<call>'
                              '{"name": "f", "args": {"a": 1}}<end><over>'),
    ("lines", "", "[call f]\na: 1\nb : x: y\n\nnone\n[end]"),
]  # fmt: skip


def read(
    name: str | dict[str, Any], prompt: str, parts: list[str], schemas: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[str]]:
    """Return what our parser makes of an answer: the message, and its texts as they were sent."""
    template = ResponseTemplate.load(SPECS[name] if isinstance(name, str) else name)
    parser = ResponseParser(ResponseStyle(template, template.answer_begins(prompt), schemas))
    pieces = [piece for part in parts for piece in parser.feed(part)] + parser.finish()
    message: dict[str, Any] = {}
    for piece in pieces:
        match piece:
            case Content(text):
                message["content"] = message.get("content", "") + text
            case Reasoning(text):
                message["thinking"] = message.get("thinking", "") + text
            case CallStart(index, called):
                assert index == len(message.setdefault("tool_calls", []))
                message["tool_calls"].append({"name": called, "arguments": ""})
            case CallArguments(index, text):
                message["tool_calls"][index]["arguments"] += text
    for call in message.get("tool_calls", []):
        call["arguments"] = json.loads(call["arguments"])
    return message, [piece.text for piece in pieces if isinstance(piece, Content | Reasoning)]


@pytest.mark.parametrize(("name", "prompt", "text"), EXAMPLES)
def test_answers_are_read_as_transformers_reads_them(name: str, prompt: str, text: str) -> None:
    """Content, thinking and calls are those of transformers' parser, wherever the stream is cut."""
    expected = parse_response(text, SPECS[name], prefix=prompt)
    expected.pop("role")
    if "tool_calls" in expected:
        expected["tool_calls"] = [call["function"] for call in expected["tool_calls"]]
    rng = random.Random(0)
    ways = [[text], list(text)]
    for _ in range(25):
        cuts = [0, *sorted(rng.sample(range(1, len(text)), 4)), len(text)]
        ways.append([text[a:b] for a, b in pairwise(cuts)])
    for parts in ways:
        assert read(name, prompt, parts, {})[0] == expected


def test_text_is_sent_as_it_comes() -> None:
    """Text that can be no delimiter is not held back; white space waits for what follows it."""
    _, texts = read("json", "", list("<think>ab c</think> d <e"), {})
    assert texts == ["a", "b", " c", "d", " <e"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # Later occurrences do not replace what is sent; a call that is broken or cut short is text.
        ("json", 'a <tool_call>{"name": "f"}</tool_call> b <tool_call>{]</tool_call>',
         {"content": "a\nb<tool_call>{]</tool_call>", "tool_calls": [{"name": "f", "arguments": {}}]}),
        ("json", '<tool_call>{"name": "f", "argum', {"content": '<tool_call>{"name": "f", "argum'}),
        ("json", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
         {"content": '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'}),
        ("json", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
         {"tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}),
        ("json", "<tool_call>[" * 3 + "</tool_call>", {"content": "<tool_call>[" * 3 + "</tool_call>"}),
        ("json", '<tool_call>{"name": 5}</tool_call>', {"content": '<tool_call>{"name": 5}</tool_call>'}),
    ],
)  # fmt: skip
def test_what_transformers_refuses_or_overwrites_is_kept(name: str, text: str, message: dict[str, Any]) -> None:
    """An answer always has all its text."""
    assert read(name, "", list(text), {})[0] == message


def test_without_tools_a_call_is_text() -> None:
    """Nobody asked for calls, so none is returned."""
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read("json", "", [text], None)[0] == {"content": text}


def test_arguments_have_the_types_of_their_schema() -> None:
    """Texts in tags become numbers, booleans and lists where the tool's schema says so, as in transformers."""
    given = {
        "i": "3.0",
        "n": "2",
        "x": "2.50",
        "b": "TRUE",
        "l": "[1]",
        "o": "{}",
        "s": "7",
        "u": "null",
        "w": "no",
        "v": "9",
    }
    types: dict[str, Any] = {"i": "integer", "n": "number", "x": "number", "b": "boolean", "l": "array", "o": "object"}
    properties: dict[str, Any] = {name: {"type": kind} for name, kind in types.items()}
    properties |= {
        "s": {"type": "string"},
        "u": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "w": {"type": "integer"},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    tags = "".join(f"<parameter={name}>{value}</parameter>" for name, value in given.items())
    text = f"<tool_call><function=f>{tags}</tool_call>"
    expected = parse_response(text, SPECS["tags"], prefix="", tools=[tool])["tool_calls"][0]["function"]
    assert read("tags", "", [text], {"f": {"properties": properties}})[0]["tool_calls"] == [expected]
    assert expected["arguments"]["i"] == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "version"),
        ({"extra": 1}, "extra"),
        ({"start_anchor": None}, "start_anchor"),
        ({"fields": {}}, "fields"),
        ({"fields": {"a": {}, "b": {}}}, "a and b"),
        ({"fields": {"a": {"open": ""}}}, "fields.a.open"),
        ({"fields": {"a": {"open": "x", "open_pattern": "x"}}}, "exclude"),
        ({"fields": {"a": {"open_pattern": "("}}}, "fields.a.open_pattern"),
        ({"fields": {"a": {"open_pattern": "a{99999999}"}}}, "fields.a.open_pattern"),
        ({"fields": {"a": {"open_pattern": "((a{90}){90}){90}"}}}, "fields.a.open_pattern"),
        ({"fields": {"a": {"open_pattern": "(" * 400}}}, "fields.a.open_pattern"),
        ({"fields": {"a": {"content": "python-call-list"}}}, "content"),
        ({"fields": {"a": {"content": "json", "content_args": {"lax": True}}}}, "content_args.lax"),
        ({"fields": {"a": {"content": "xml-inline"}}}, "tag_pattern"),
        ({"fields": {"a": {"content": "xml-inline", "content_args": {"tag_pattern": "(?P<key>x)"}}}}, "value"),
        ({"fields": {"a": {"transform": "{content} x"}}}, "transform"),
        ({"fields": {"a": {"join": ","}}}, "join"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_by_field(changes: dict[str, Any], says: str) -> None:
    """Each refusal names its field."""
    with pytest.raises(TemplateError, match=says):
        ResponseTemplate.load({**SPECS["json"], **changes})


@pytest.mark.parametrize(
    ("pattern", "text"),
    [(r"(a+)+$", "a" * 60 + "!" + "b" * 200), (r"(?:x*)*y", "x" * 3000), (r"<a.*?>z", "<a" * 3000), ("(?=b)", "abab")],
)
def test_no_pattern_holds_an_answer_up(pattern: str, text: str) -> None:
    """A pattern that takes too long is given up, one that matches nothing makes progress; the text is all there."""
    template = spec(thinking={"open_pattern": pattern, "close_pattern": "(?=a)|~"}, content={})
    message, _ = read(template, "", [text], {})
    said = message.get("content", "") + message.get("thinking", "")
    assert sorted(said.replace("\n", "")) == sorted(text)


# --- over HTTP ----------------------------------------------------------------------------------------------------

TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WEATHER = function("get_weather", city={"type": "string"}, days={"type": "integer"})
ANSWER = (
    "[think]Hm.\n[/think]\nLet me see. <fn get_weather>\n<parameter=city>Paris</parameter>"
    "<parameter=days>3</parameter></fn>"
)
OWN = spec(
    "<|im_start|>assistant\n",
    thinking={"open": "[think]", "close": "[/think]"},
    tool_calls={
        "open_pattern": r"<fn (?P<name>\w+)>", "close": "</fn>", "repeats": True,
        "content": "xml-inline", "content_args": {"tag_pattern": TAG}, "transform": NAMED,
    },
    content={"close": "<|im_end|>"},
)  # fmt: skip


@asynccontextmanager
async def served(template: object, reply: str = ANSWER) -> AsyncIterator[ServerApp]:
    """Serve a model with a response template that answers `reply`."""
    tokenizer = stub_tokenizer(TEMPLATE)
    tokenizer.response_template = template
    async with open_stub(StubRunner(reply=reply, max_model_len=2000), tokenizer) as engine:
        yield create_app(engine, Config())


HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


async def test_a_chat_is_read_with_the_model_s_template() -> None:
    """Thinking, content and calls, with the schema's types; streamed they are the same."""
    async with served(OWN) as app:
        body = {"messages": HI, "tools": [WEATHER]}
        answer = await ask(app, "POST", "/v1/chat/completions", body)
        choice = answer.json()["choices"][0]
        message = choice["message"]
        assert (message["reasoning"], message["content"], choice["finish_reason"]) == (
            "Hm.",
            "Let me see.",
            "tool_calls",
        )
        (call,) = message["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
            "get_weather",
            {"city": "Paris", "days": 3},
        )
        stream = await ask(app, "POST", "/v1/chat/completions", {**body, "stream": True})
        assert streamed(stream.events()) == whole(answer.json())


async def test_responses_and_messages_are_read_with_it_too() -> None:
    """The other two chat APIs read the same answer."""
    async with served(OWN) as app:
        tool = {"type": "function", **WEATHER["function"]}
        answer = await ask(app, "POST", "/v1/responses", {"input": "hi", "tools": [tool]})
        items = answer.json()["output"]
        assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
        assert json.loads(items[2]["arguments"]) == {"city": "Paris", "days": 3}
        tool = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
        fields = {"messages": HI, "max_tokens": 500, "tools": [tool], "thinking": {"type": "adaptive"}}
        answer = await ask(app, "POST", "/v1/messages", fields)
        blocks = answer.json()["content"]
        assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
        assert blocks[2]["input"] == {"city": "Paris", "days": 3}


async def test_an_answer_cannot_be_held_to_calls_in_a_form_of_the_model_s_own() -> None:
    """What would need a grammar of that form is refused by name."""
    async with served(OWN) as app:
        strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
        for fields in ({"tools": [WEATHER], "tool_choice": "required"}, {"tools": [strict]}):
            answer = await ask(app, "POST", "/v1/chat/completions", {"messages": HI, **fields})
            assert (answer.status, answer.json()["error"]["param"]) == (400, "tool_choice")


async def test_an_answer_that_a_grammar_holds_is_not_read_with_it() -> None:
    """JSON comes without the delimiters that the template wants around it."""
    wants = spec("<|im_start|>assistant\n", content={"open": "<say>", "close": "</say>"})
    async with served(wants, "[1]") as app:
        fields = {"messages": HI, "structured_outputs": {"choice": ["[1]"]}}
        answer = await ask(app, "POST", "/v1/chat/completions", fields)
        assert answer.json()["choices"][0]["message"]["content"] == "[1]"


async def test_a_template_that_cannot_be_used_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The model is served without it; so is one whose further fields no API has."""
    async with served({**OWN, "version": 2}, "Hello.") as app:
        assert app.services.response_template is None
        answer = await ask(app, "POST", "/v1/chat/completions", {"messages": HI})
        assert answer.json()["choices"][0]["message"]["content"] == "Hello."
    (warning,) = [record.getMessage() for record in caplog.records if "response_template" in record.getMessage()]
    assert "version" in warning
    caplog.clear()
    async with served({**OWN, "fields": {**OWN["fields"], "images": {"open": "<img>", "close": "</img>"}}}):
        (warning,) = [record.getMessage() for record in caplog.records if "response_template" in record.getMessage()]
        assert "images" in warning
