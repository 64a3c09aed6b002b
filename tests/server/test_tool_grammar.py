"""Under a tool grammar, whatever the model would prefer, what it writes are calls that parse and satisfy the schema."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import tokenizers

from trio_llm.errors import InvalidRequestError
from trio_llm.grammar import GrammarCompiler, GrammarSource
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content
from trio_llm.server.parsing.tools import ToolForm, ToolParser
from trio_llm.server.tool_grammar import Tool, tool_grammar

EOS = 0
TOOLS = [
    Tool("add", {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
                 "additionalProperties": False}),
    Tool("get_weather", {"type": "object", "properties": {"city": {"enum": ["Paris", "Zürich"]}}, "required": ["city"],
                         "additionalProperties": False}),
]  # fmt: skip
MARKERS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"]


def make_tokenizer(special: list[str]) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer in which `special` are control tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [],
        tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|end|>", *special],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def write(source: GrammarSource, tokenizer: tokenizers.Tokenizer, dice: random.Random, prefer: str = "") -> str:
    """Write an answer of random allowed tokens, beginning with `prefer`, ending as soon as it may."""
    vocab_size = tokenizer.get_vocab_size()
    compiler = GrammarCompiler(tokenizer.to_str(), vocab_size=vocab_size, eos_token_ids=[EOS])
    matcher, mask = compiler.compile(source).matcher(), np.zeros((vocab_size + 31) // 32, np.int32)
    wanted, ids = tokenizer.encode(prefer).ids, []
    for position in range(500):
        assert matcher.fill(mask.ctypes.data, mask.nbytes) is None
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        token = EOS if EOS in allowed and position >= len(wanted) else dice.choice(allowed)
        if position < len(wanted):
            assert wanted[position] in allowed
            token = wanted[position]
        matcher.consume([token])
        if token == EOS:
            return tokenizer.decode(ids, skip_special_tokens=False)
        ids.append(token)
    raise AssertionError("no end in sight")


def calls_of(form: ToolForm, text: str) -> tuple[str, list[tuple[str, dict[str, object]]]]:
    """Parse an answer as the server does."""
    parser = ToolParser(form)
    pieces = parser.feed(text) + parser.finish()
    names = [piece.name for piece in pieces if isinstance(piece, CallStart)]
    arguments = [
        "".join(p.text for p in pieces if isinstance(p, CallArguments) and p.index == i) for i in range(len(names))
    ]
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    return content, [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


def check(calls: list[tuple[str, dict[str, object]]]) -> None:
    """Assert that each call is one of a known tool, with arguments of its schema."""
    for name, arguments in calls:
        if name == "add":
            assert set(arguments) == {"a", "b"} and all(isinstance(value, int) for value in arguments.values())
        else:
            assert name == "get_weather" and arguments["city"] in ("Paris", "Zürich")


@pytest.mark.parametrize("special", [[], MARKERS[:4], MARKERS], ids=["plain", "control", "named"])
@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral"])
@pytest.mark.parametrize("parallel", [False, True])
def test_required_means_calls_and_nothing_else(form: ToolForm, special: list[str], parallel: bool) -> None:
    """Every answer is at least one good call without any text, exactly one unless several are allowed."""
    tokenizer = make_tokenizer(special)
    ids = {literal: tokenizer.token_to_id(literal) for literal in special}
    source = tool_grammar(form, TOOLS, mode="required", parallel=parallel, special_tokens=ids)
    dice = random.Random(7)
    for _ in range(6):
        content, calls = calls_of(form, write(source, tokenizer, dice))
        check(calls)
        assert content == "" and (calls if parallel else len(calls) == 1)


OPENINGS = {
    "hermes": "Let me see.<tool_call>\n",
    "llama3": '{"name": "',
    "mistral": "Let me see.[TOOL_CALLS]",
}


@pytest.mark.parametrize("special", [[], MARKERS[:4], MARKERS], ids=["plain", "control", "named"])
@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral"])
def test_auto_leaves_text_free_and_binds_calls(form: ToolForm, special: list[str]) -> None:
    """An answer may be any text; once the model opens a call, it is a good one."""
    tokenizer = make_tokenizer(special)
    ids = {literal: tokenizer.token_to_id(literal) for literal in special}
    source = tool_grammar(form, TOOLS, mode="auto", parallel=True, special_tokens=ids)
    dice = random.Random(3)
    assert write(source, tokenizer, dice, prefer="Just text [1] <b>.") == "Just text [1] <b>."
    for _ in range(4):
        _, calls = calls_of(form, write(source, tokenizer, dice, prefer=OPENINGS[form]))
        check(calls)
        assert calls


def test_a_tool_with_an_impossible_schema_is_the_clients_error() -> None:
    """A schema that cannot be used is refused by name before anything runs."""
    tokenizer = make_tokenizer([])
    source = tool_grammar("hermes", [Tool("f", {"type": "strin"})], mode="required", parallel=False, special_tokens={})
    with pytest.raises(InvalidRequestError) as caught:
        GrammarCompiler(tokenizer.to_str(), vocab_size=300, eos_token_ids=[EOS]).compile(source)
    assert caught.value.param == "tools"
