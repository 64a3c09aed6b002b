"""Bodies that JSON parsers let through and this server does not, and the fields that are checked in them."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import convert

from tests.server.helpers import ask
from tests.server.stub import StubRunner, open_stub
from trio_llm.config import Config, LimitsConfig
from trio_llm.errors import InvalidRequestError
from trio_llm.server.anthropic.body import CountTokensBody, Turn, conversation
from trio_llm.server.app import create_app
from trio_llm.server.bodies import request_body, strict_json
from trio_llm.server.bodies.pipeline import parse_body
from trio_llm.server.bodies.strict_json import parse_object
from trio_llm.server.bodies.types import ChatBody, CompletionBody

LIMITS = LimitsConfig()
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.booleans())
def test_good_json_is_what_json_says(value: dict[str, Any], ascii_only: bool) -> None:
    """Whatever is an object of ordinary values is parsed as the standard library would."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_object(text.encode(), LIMITS) == json.loads(text)


@given(
    st.binary()
    | st.text().map(str.encode)
    | st.lists(st.sampled_from(list('{}[]",:\\u0d18a1eE+-. ')), max_size=40).map(lambda p: "".join(p).encode())
)
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    """Any bytes are an object or an InvalidRequestError."""
    with contextlib.suppress(InvalidRequestError):
        assert isinstance(parse_object(data, LIMITS), dict)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"[" * 1000, "nested"),  # L7: RecursionError, hence 500
        (b'{"a":' * 100_000, "nested"),
        (b'{"a":[' + b"[]," * LIMITS.max_json_nodes + b"1]}", "--max-json-nodes"),
        (b'{"a": "\xff"}', "UTF-8"),  # L8: UnicodeDecodeError, hence 500
        ('{"a": "x"}'.encode("utf-16"), "UTF-8"),
        (b"\x1f\x8b\x08\x00", "UTF-8"),
        (b'{"temperature": NaN}', "NaN"),  # L9: accepted
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"temperature": 1e400}', "out of range"),
        (b'{"a": {"b": ["\\ud800"]}}', "'a.b[0]'"),  # L10: 500 or TypeError further down
        (b'{"\\udc00": 1}', "Unicode"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' occurs twice"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
        (b'{"a": 1', "line 1"),
        (b"3", "object"),
        (b"", "not valid JSON"),
    ],
)
def test_what_is_refused(body: bytes, word: str) -> None:
    """L7-L10: each of these is one clear InvalidRequestError."""
    with pytest.raises(InvalidRequestError, match=re.escape(word)):
        parse_object(body, LIMITS)


def test_brackets_in_strings_do_not_nest() -> None:
    """The nesting limit counts structure, not text, and allows exactly LIMITS.max_json_depth."""
    assert parse_object(b'{"a": "[[[' + b"[" * 100 + b'\\"]"}', LIMITS)["a"].endswith('"]')
    deepest = b'{"a":' + b"[" * (LIMITS.max_json_depth - 1) + b"]" * (LIMITS.max_json_depth - 1) + b"}"
    assert parse_object(deepest, LIMITS)
    with pytest.raises(InvalidRequestError):
        parse_object(deepest.replace(b"[]", b"[[]]"), LIMITS)


def test_structure_is_seen_behind_many_strings() -> None:
    """Strings are skipped thousands at a time, and what nests behind any number of them still counts."""
    for count in (1, 4095, 4096, 4097, 8192, 20_000):
        strings = b'"[",' * count
        depth = LIMITS.max_json_depth - 2
        body = b'{"a":[' + strings + b"[" * depth + b"]" * depth + b"]}"
        assert len(parse_object(body, LIMITS)["a"]) == count + 1
        with pytest.raises(InvalidRequestError, match="nested"):
            parse_object(body.replace(b"[]", b"[[]]"), LIMITS)


def test_only_keys_count_as_keys() -> None:
    """Colons in strings are no keys, however quotes are escaped and whatever stands before a key's colon."""
    most = LIMITS.max_json_keys
    text = {"a": [':"x":' * most, '\\":' * most, "\\\\"], 'b":': ":"}
    assert parse_object(json.dumps(text).encode(), LIMITS) == text
    keys = b",".join(b'"%d" \n:":"' % i for i in range(most))
    assert len(parse_object(b"{" + keys + b"}", LIMITS)) == most
    with pytest.raises(InvalidRequestError, match="max-json-keys"):
        parse_object(b'{"a":0,' + keys + b"}", LIMITS)


def test_pairs_of_surrogates_are_a_character() -> None:
    """A whole surrogate pair in escapes is fine."""
    assert parse_object(b'{"a": "\\ud83d\\ude00"}', LIMITS) == {"a": "\U0001f600"}


CHAT = {"messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"prompt": "x"}
HUGE = 2**63
PART = {"type": "text", "text": 1}

# field -> values that are refused, each naming the field
REFUSED: dict[str, list[Any]] = {
    "model": [1, [], {}, True],
    "temperature": [-0.1, 2.1, "1", True, [], 1e308],
    "top_p": [0, 1.1, "1", True],
    "top_k": [-2, 1.5, "1", True, HUGE],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, "1"],
    "logit_bias": [[], {"1": "x"}, {"1": 101}, {str(i): 1 for i in range(1025)}],
    "allowed_token_ids": [[], ["a"], 1],
    "bad_words": ["x", [1], [""], ["x"] * 129],
    "seed": [HUGE, -HUGE - 1, 1.5, "1"],
    "n": [0, -1, 10**6, HUGE, 1.5, "3", True],
    "max_tokens": [-1, 1.5, "16", True],
    "min_tokens": [-1],
    "stop": [1, [1], {}],
    "stop_token_ids": [[1] * 65, ["x"]],
    "include_stop_str_in_output": ["yes", 1],
    "ignore_eos": ["yes"],
    "skip_special_tokens": ["yes"],
    "prompt_logprobs": [-2, "1"],
    "echo": [1],
    "stream": ["true", 1],
    "stream_options": [[], {"include_usage": 1}],
    "truncate_prompt_tokens": [-2],
    "truncation_side": ["middle"],
    "priority": [HUGE, "1"],
    "cache_salt": ["", "a/b", "a@b", "a\\b", "a\0b", "é", "x" * 129],
    "user": [1, "x" * 513],
    "metadata": [{"a": 1}, {"a" * 65: "b"}, {"a": "b" * 513}, {str(i): "" for i in range(17)}, []],
    "return_token_ids": ["x"],
}


@pytest.mark.parametrize("field", REFUSED)
def test_wrong_values_are_refused_by_name(field: str) -> None:
    """A value of the wrong type or out of range is refused in both endpoints, naming the field; null is absence."""
    for kind, base in ((ChatBody, CHAT), (CompletionBody, COMPLETION)):
        for value in REFUSED[field]:
            with pytest.raises(InvalidRequestError) as caught:
                parse_body(json.dumps({**base, field: value}).encode(), kind, LIMITS)
            assert caught.value.param is not None, (value, caught.value)
            assert caught.value.param.startswith(field), (value, caught.value)
        body, unknown = parse_body(json.dumps({**base, field: None}).encode(), kind, LIMITS)
        assert getattr(body, field) is None
        assert unknown == ()


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (ChatBody, {}, "messages"),
        (ChatBody, {"messages": []}, "messages"),
        (ChatBody, {"messages": "hi"}, "messages"),
        (ChatBody, {"messages": [{"role": "user", "content": "x"}] * 2049}, "messages"),
        (ChatBody, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (ChatBody, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        (ChatBody, {"messages": [{"role": "user", "content": [PART]}]}, "messages[0].content[0].text"),
        (ChatBody, {**CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
        (ChatBody, {**CHAT, "logprobs": 1}, "logprobs"),
        (ChatBody, {**CHAT, "top_logprobs": -2}, "top_logprobs"),
        (CompletionBody, {}, "prompt"),
        (CompletionBody, {"prompt": None}, "prompt"),
        (CompletionBody, {"prompt": {"a": 1}}, "prompt"),
        (CompletionBody, {**COMPLETION, "logprobs": True}, "logprobs"),
    ],
)  # fmt: skip
def test_paths_name_the_place(kind: Any, body: dict[str, Any], param: str) -> None:
    """The error's param is the path of what is wrong or missing."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(json.dumps(body).encode(), kind, LIMITS)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ChatBody, {"temperature": 5}, "'temperature': expected `float` <= 2.0, got 5."),
        (ChatBody, {"top_p": 0}, "'top_p': expected `float` > 0.0, got 0."),
        (ChatBody, {"n": "two"}, "'n': expected `int`, got `str`."),
        (ChatBody, {"logit_bias": {"5": 101}}, "'logit_bias[...]': expected `float` <= 100.0."),
        (ChatBody, {"messages": [{"role": "user"}, {"role": "bot"}]},
         "'messages[1].role': 'bot' is none of 'assistant', 'developer', 'system', 'tool', 'user'."),
        (ChatBody, {"tool_choice": "any"}, "'tool_choice': 'any' is none of 'auto', 'none', 'required'."),
        (ChatBody, {"response_format": {"type": "j" * 99}},
         f"'response_format.type': '{'j' * 64}' is none of 'json_object', 'json_schema', 'text'."),
        (ChatBody, {"tools": [{"type": "custom", "custom": {"name": "f", "format": {"type": "regex"}}}]},
         "'tools[0].custom.format.type': 'regex' is none of 'text', 'grammar'."),
        (CountTokensBody, {"messages": [{"role": "bot", "content": "a"}]},
         "'messages[0].role': 'bot' is none of 'assistant', 'system', 'user'."),
    ],
)  # fmt: skip
def test_an_error_names_the_value_and_what_is_allowed(kind: Any, fields: dict[str, Any], message: str) -> None:
    """A number out of range is named beside the bound, an unknown word beside the ones that there are."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(json.dumps({**CHAT, **fields}).encode(), kind, LIMITS)
    assert caught.value.message == f"Invalid value for {message}"


@pytest.mark.parametrize(
    ("kind", "field", "hint"),
    [
        (ChatBody, "guided_json", "; use 'structured_outputs'."),
        (ChatBody, "functions", "; use 'tools'."),
        (CountTokensBody, "guided_json", "."),  # It has no structured_outputs.
        (ChatBody, "vllm_xargs", "."),
    ],
)
def test_a_refused_field_names_the_one_that_takes_its_place(kind: Any, field: str, hint: str) -> None:
    """The hint is the endpoint's own field; where it has none there is no hint."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(json.dumps({**CHAT, field: [{}]}).encode(), kind, LIMITS)
    assert caught.value.message == f"'{field}' is not supported by this server{hint}"


@pytest.mark.parametrize(
    ("field", "neutral", "meant"),
    [
        ("tools", None, []),
        ("functions", None, [{"name": "f"}]),
        ("function_call", "none", "auto"),
        ("guided_json", None, {}),
        ("suffix", "", "x"),
        ("use_beam_search", False, True),
        ("chat_template", None, "{{ 'a' * 10**9 }}"),
        ("kv_transfer_params", None, {}),
        ("vllm_xargs", None, {}),
        ("thinking_token_budget", 0, -1),
        ("store", False, True),
        ("prompt_embeds", None, "x"),
        ("reasoning_effort", "high", "extreme"),
    ],
)
def test_what_is_not_built_is_refused_by_name(field: str, neutral: Any, meant: Any) -> None:
    """A known field that would change the answer and cannot is a 400 naming it; its neutral value passes."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(json.dumps({**CHAT, field: meant}).encode(), ChatBody, LIMITS)
    assert caught.value.param == field
    _, unknown = parse_body(json.dumps({**CHAT, field: neutral}).encode(), ChatBody, LIMITS)
    assert unknown == ()


def test_unknown_fields_are_reported() -> None:
    """Fields that nobody knows pass, and are handed back by name, those of stream_options too."""
    body = {**CHAT, "foo": 1, "bar": None, "stream_options": {"bar": True}}
    extras = parse_body(json.dumps(body).encode(), ChatBody, LIMITS)[1]
    assert [(extra.path, extra.kind) for extra in extras] == [("foo", "unknown"), ("stream_options.bar", "unknown")]


MEGABYTES = {
    "empty strings": b'{"prompt":[' + b'"",' * 690_000 + b'""]}',
    "numbers": b'{"prompt":[' + b"1," * 1_040_000 + b"1]}",
    "unknown keys": b'{"prompt":"a",' + b",".join(b'"k%d":1' % i for i in range(180_000)) + b"}",
    "biases": b'{"prompt":"a","logit_bias":{' + b",".join(b'"%d":1' % i for i in range(150_000)) + b"}}",
}


@pytest.mark.parametrize("body", MEGABYTES.values(), ids=MEGABYTES)
async def test_large_bodies_are_parsed_off_the_event_loop(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of 2 MB is parsed in another thread than the event loop's; a small one is not worth a thread."""
    on_loop: list[bool] = []

    def parse(*args: Any) -> Any:
        on_loop.append(threading.current_thread() is threading.main_thread())
        return parse_body(*args)

    monkeypatch.setattr(request_body, "parse_body", parse)
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        await ask(app, "POST", "/v1/completions", body)
        await ask(app, "POST", "/v1/completions", b'{"prompt":"a"}')
    assert on_loop == [False, True]


def test_strings_cost_no_step_of_the_nesting_check() -> None:
    """The check of the nesting takes a step per bracket, not per string: it took 0.3 s for 690,000 of them.

    One step for all of them would let no other thread run meanwhile.
    """
    matches = list(strict_json._NEXT_BRACKET.finditer(MEGABYTES["empty strings"]))
    assert [match[1] for match in matches if match[1]] == [b"{", b"[", b"]", b"}"]
    assert 100 < len(matches) < 200
    assert max(match.end() - match.start() for match in matches) < 20_000


@pytest.mark.parametrize(
    "tail", [b"1," * 1_000_000 + b"x", b'"' * 1_000_001, b'"' + b"\\" * 1_000_001, b"{" + b" " * 10**6]
)
def test_bodies_that_break_off_are_refused_in_linear_time(tail: bytes) -> None:
    """A large body without its last brackets is read once: a search from each byte of it would take hours."""
    with pytest.raises(InvalidRequestError):
        parse_object(b'{"prompt":[' + tail, LIMITS)


def test_unknown_fields_are_counted_out() -> None:
    """Of 180,000 unknown fields the first hundred are reported; one that is refused is found behind them all."""
    limits = attrs.evolve(LIMITS, max_json_keys=200_000)
    extras = parse_body(MEGABYTES["unknown keys"], CompletionBody, limits)[1]
    assert [extra.path for extra in extras] == [f"k{i}" for i in range(100)]
    refused = MEGABYTES["unknown keys"].replace(b'"k179999"', b'"guided_json"')
    with pytest.raises(InvalidRequestError, match="guided_json"):
        parse_body(refused, CompletionBody, limits)


def test_turns_of_many_blocks_take_linear_time() -> None:
    """9,000 blocks of one turn are put together at once; one by one they took 6 s on the event loop."""
    blocks = [{"type": "text", "text": "a"}] * 9000
    turns = conversation(CountTokensBody(messages=convert([{"role": "user", "content": blocks}], list[Turn])))
    assert [len(turn.content or ()) for turn in turns] == [9000]


async def test_errors_name_flags_that_exist() -> None:
    """A refusal of too many items names the client's field and the flag as it is."""
    items = [{"role": "user", "content": "a"}] * (LIMITS.max_messages + 1)
    async with open_stub(StubRunner()) as engine:
        answer = await ask(create_app(engine, Config()), "POST", "/v1/responses", {"model": "stub", "input": items})
    assert (answer.status, answer.json()["error"]["param"]) == (400, "input")
    assert "input: 2049" in answer.json()["error"]["message"]
    assert "--max-messages" in answer.json()["error"]["message"]
