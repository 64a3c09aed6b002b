"""Under a tool grammar, whatever the model would prefer, what it writes are calls that parse and satisfy the schema."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import tokenizers

from trio_llm.errors import InvalidRequestError
from trio_llm.grammar import Grammar, GrammarCompiler, GrammarSource, compose, regex
from trio_llm.server.constraints.tool_grammar import Mode, Tool, tool_grammar
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content
from trio_llm.server.parsing.tools import ToolForm, ToolParser

EOS = 0
TOOLS = [
    Tool("add", {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
                 "additionalProperties": False}),
    Tool("get_weather", {"type": "object", "properties": {"city": {"enum": ["Paris", "Zürich"]}}, "required": ["city"],
                         "additionalProperties": False}),
]  # fmt: skip
MARKERS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"]


KINDS = pytest.mark.parametrize(
    ("special", "unmarked"),
    [([], False), (MARKERS[:4], False), (MARKERS, False), (MARKERS[:4], True), (MARKERS, True)],
    ids=["plain", "control", "named", "unmarked", "unmarked-named"],
)


def make_tokenizer(special: list[str], *, unmarked: bool = False) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer in which `special` are control tokens, or `unmarked` as Qwen's <tool_call> is."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [],
        tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|end|>", *([] if unmarked else special)],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if unmarked:
        tokenizer.add_tokens(special)
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


@KINDS
@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral"])
@pytest.mark.parametrize("parallel", [False, True])
def test_required_means_calls_and_nothing_else(
    form: ToolForm, special: list[str], unmarked: bool, parallel: bool
) -> None:
    """Every answer is at least one good call without any text, exactly one unless several are allowed."""
    tokenizer = make_tokenizer(special, unmarked=unmarked)
    ids = {literal: tokenizer.token_to_id(literal) for literal in special}
    source = tool_grammar(form, TOOLS, mode="required", parallel=parallel, added_tokens=ids)
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


@KINDS
@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral"])
def test_auto_leaves_text_free_and_binds_calls(form: ToolForm, special: list[str], unmarked: bool) -> None:
    """An answer may be any text; once the model opens a call, it is a good one."""
    tokenizer = make_tokenizer(special, unmarked=unmarked)
    ids = {literal: tokenizer.token_to_id(literal) for literal in special}
    source = tool_grammar(form, TOOLS, mode="auto", parallel=True, added_tokens=ids)
    dice = random.Random(3)
    assert write(source, tokenizer, dice, prefer="Just text [1] <b>.") == "Just text [1] <b>."
    for _ in range(4):
        _, calls = calls_of(form, write(source, tokenizer, dice, prefer=OPENINGS[form]))
        check(calls)
        assert calls


CALL = '{"name": "get_weather", "%s": {"city": "Paris"}}'
# Form -> the answer's beginning, a call, what stands between two calls, and the end.
SPELLED = {
    "hermes": ("", "<tool_call>\n" + CALL % "arguments" + "\n</tool_call>", "\n", ""),
    "llama3": ("", CALL % "parameters", "; ", ""),
    "mistral": ("[TOOL_CALLS][", CALL % "arguments", ", ", "]"),
    "named": ("", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", ""),
    "gemma4": ("", '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>', "", ""),
}


@pytest.mark.parametrize("mode", ["required", "alongside"])
@pytest.mark.parametrize("form", SPELLED)
def test_an_answer_has_a_bounded_number_of_calls(form: Any, mode: Mode) -> None:
    """A weak model repeats its call until the context is full: 32 calls are allowed, or one unless parallel."""
    begin, call, between, end = SPELLED[form]
    special = ["[TOOL_CALLS]", "[ARGS]"] if form == "named" else []
    tokenizer = make_tokenizer(special)
    ids = {literal: tokenizer.token_to_id(literal) for literal in special}
    for parallel, most in ((True, 32), (False, 1)):
        options: Any = {"mode": mode, "parallel": parallel, "added_tokens": ids}
        source = tool_grammar("mistral" if special else form, TOOLS, **options)
        compiler = GrammarCompiler(tokenizer.to_str(), vocab_size=tokenizer.get_vocab_size(), eos_token_ids=[EOS])
        compiled = compiler.compile(source)

        def is_allowed(num_calls: int, compiled: Grammar = compiled) -> bool:
            tokens = tokenizer.encode(begin + between.join([call] * num_calls) + end).ids
            return compiled.matcher().consume(tokens) == len(tokens)

        assert is_allowed(most) and not is_allowed(most + 1)


@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"type": "strin"}, "Invalid type"),
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, "unclosed group"),
    ],
)
def test_a_tool_with_an_impossible_schema_is_the_clients_error(form: Any, wrong: dict[str, Any], says: str) -> None:
    """Of many tools the one whose schema cannot be used is named, in a grammar of its own and in a composed one."""
    tokenizer = make_tokenizer([])
    tools = [*TOOLS, Tool("evil", wrong)]
    source = tool_grammar(form, tools, mode="required", parallel=False, added_tokens={})
    for whole in (source, compose(["start: @form_0 | @form_1"], [source, regex("a", param="other")])):
        with pytest.raises(
            InvalidRequestError, match=f"tools: the parameters of 'evil' cannot be used: .*{says}"
        ) as caught:
            GrammarCompiler(tokenizer.to_str(), vocab_size=300, eos_token_ids=[EOS]).compile(whole)
        assert caught.value.param == "tools"


def test_whole_objects_have_bounded_blanks() -> None:
    """Beside a format, calls of Llama 3 are whole JSON objects: nothing but blanks would be one for ever."""
    tokenizer = make_tokenizer([])
    source = tool_grammar("llama3", TOOLS, mode="alongside", parallel=False, added_tokens={})
    compiler = GrammarCompiler(tokenizer.to_str(), vocab_size=tokenizer.get_vocab_size(), eos_token_ids=[EOS])
    tokens = tokenizer.encode("{" + 9 * "\n").ids
    assert compiler.compile(source).matcher().consume(tokens) < len(tokens)
