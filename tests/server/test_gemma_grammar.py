"""Gemma 4's calls under a grammar: what the schemas of tools allow can be written, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.stub import stub_tokenizer
from trio_llm.errors import InvalidRequestError
from trio_llm.grammar import GrammarCompiler
from trio_llm.server.constraints.tool_grammar import Tool, tool_grammar

TOKENIZER = stub_tokenizer("", "<|tool_call>", "<tool_call|>", '<|"|>')
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["c", "f", 3, None]},
        "flags": {"type": "array", "items": {"type": "boolean"}},
        "at": {"type": ["object", "null"], "properties": {"x": {"type": "number"}}, "required": ["x"]},
    },
    "required": ["city", "unit"],
}


def is_allowed(text: str, mode: Any = "required", parallel: bool = True) -> bool:
    """Say whether an answer may be all of `text`."""
    tools = [Tool("weather", WEATHER, strict=True), Tool("any", {})]
    source = tool_grammar("gemma4", tools, mode=mode, parallel=parallel, added_tokens=TOKENIZER.special_tokens)
    compiler = GrammarCompiler(TOKENIZER.json, vocab_size=TOKENIZER.vocab_size, eos_token_ids=(0,))
    ids = [*TOKENIZER.encode(text, add_special_tokens=False), 0]
    return compiler.compile(source).matcher().consume(ids) == len(ids)


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ('city:<|"|>Paris, {x}<|"|>,unit:<|"|>c<|"|>', True),
        ('at:{x:-1.5},city:<|"|><|"|>,days:3,flags:[true,false],unit:3', True),
        ('city:<|"|>Paris<|"|>,unit:null', True),
        ('at:null,city:<|"|>Paris<|"|>,unit:3', True),
        ('at:3,city:<|"|>Paris<|"|>,unit:3', False),
        ('city:<|"|>Paris<|"|>', False),
        ('city:<|"|>Paris<|"|>,unit:<|"|>k<|"|>', False),
        ("city:Paris,unit:3", False),
        ('city:<|"|>Paris<|"|>,days:1.5,unit:3', False),
        ('at:{},city:<|"|>Paris<|"|>,unit:3', False),
        (',city:<|"|>Paris<|"|>,unit:3', False),
        ('city:<|"|>Paris<|"|>,unit:3,', False),
    ],
)
def test_arguments_follow_the_schema(arguments: str, allowed: bool) -> None:
    """Required, optional, typed and enumerated arguments, in the order of their names."""
    assert is_allowed(f"<|tool_call>call:weather{{{arguments}}}<tool_call|>") == allowed


def test_modes() -> None:
    """A call that must be is all there is; one that may be can stand behind text; parallel ones follow each other."""
    call = '<|tool_call>call:any{a:{b:[1,<|"|>x<|"|>]}}<tool_call|>'
    assert is_allowed(call) and is_allowed(call + call) and not is_allowed(call + call, parallel=False)
    assert not is_allowed("text") and not is_allowed("text" + call)
    assert is_allowed("text", "auto") and is_allowed("text" + call, "auto")
    assert not is_allowed("<|tool_call>call:none{}<tool_call|>", "auto")


def test_strict_tools_whose_schema_cannot_be_enforced_are_refused() -> None:
    """A keyword that the rules do not hold arguments to is named, at any depth; without strict it is not looked at."""
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string", "pattern": "x"}}}}
    options: Any = {"mode": "required", "parallel": True, "added_tokens": TOKENIZER.special_tokens}
    with pytest.raises(InvalidRequestError, match="'pattern'"):
        tool_grammar("gemma4", [Tool("f", schema, strict=True)], **options)
    assert tool_grammar("gemma4", [Tool("f", schema)], **options)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        *[("required", value) for value in (3, True, "a", {})],
        *[("properties", value) for value in ([], None, "a")],
        *[("type", value) for value in ("strange", [], ["string", "strange"], {}, None)],
        *[("enum", value) for value in ([], [{}], "a", None)],
        ("const", []),
    ],
)
def test_a_keyword_with_an_odd_value_constrains_nothing(keyword: str, value: object) -> None:
    """What the rules cannot read is no error of the server: it binds nothing, which a strict tool is refused for."""
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}, keyword: value}
    schema = {"type": "object", "properties": {"b": inner}}
    options: Any = {"mode": "required", "parallel": True, "added_tokens": TOKENIZER.special_tokens}
    source = tool_grammar("gemma4", [Tool("f", schema)], **options)
    GrammarCompiler(TOKENIZER.json, vocab_size=TOKENIZER.vocab_size, eos_token_ids=(0,)).compile(source)
    with pytest.raises(InvalidRequestError, match=f"'f' to '{keyword}'"):
        tool_grammar("gemma4", [Tool("f", schema, strict=True)], **options)
