"""Bodies that JSON parsers let through and this server does not, and the fields that are checked in them."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_llm.config import LimitsConfig
from trio_llm.errors import InvalidRequestError
from trio_llm.server.json_body import parse_object
from trio_llm.server.requests import ChatBody, CompletionBody, parse_body

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
        ("verbosity", "medium", "low"),
        ("store", False, True),
        ("service_tier", "auto", "flex"),
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
    assert parse_body(json.dumps(body).encode(), ChatBody, LIMITS)[1] == ("foo", "stream_options.bar")
