"""Structured output's masks, against what Python's own json and re say of the finished text."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest
import tokenizers

from trio_llm import grammar
from trio_llm.errors import InvalidRequestError

EOS = 0
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(['{"name": "Zoe", "age": 17}'] * 3, trainer)
    return tokenizer


@pytest.fixture(name="compiler")
def _compiler(tokenizer: tokenizers.Tokenizer) -> grammar.GrammarCompiler:
    # More rows of logits than tokens, as in every padded checkpoint.
    return grammar.GrammarCompiler(tokenizer.to_str(), vocab_size=333, eos_token_ids=[EOS], max_bytes=4 * 70_000)


def allowed(matcher: grammar.Matcher) -> list[int]:
    """Return the ids the mask lets through."""
    mask = np.zeros(11, np.int32)
    assert matcher.fill(mask.ctypes.data, mask.nbytes) is None
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def generate(compiled: grammar.Grammar, tokenizer: tokenizers.Tokenizer, seed: int) -> str:
    """Draw tokens uniformly from what is allowed until the end token comes, preferring it once it may come."""
    matcher, dice, ids = compiled.matcher(), random.Random(seed), []
    for _ in range(200):
        choices = allowed(matcher)
        token = EOS if EOS in choices and dice.random() < 0.5 else dice.choice(choices)
        matcher.consume([token])
        if token == EOS:
            return tokenizer.decode(ids)
        assert token < tokenizer.get_vocab_size()
        ids.append(token)
    raise AssertionError("no end in sight")


@pytest.mark.parametrize("seed", range(20))
def test_random_tokens_under_a_schema_are_json_of_that_schema(compiler, tokenizer, seed: int) -> None:
    """Whatever the model prefers, what comes out parses and has the schema's fields, types and ranges."""
    value = json.loads(generate(compiler.compile(grammar.json_schema(SCHEMA, param="p")), tokenizer, seed))
    assert set(value) == {"name", "age"}
    assert len(value["name"]) <= 8
    assert 0 <= value["age"] <= 99


def test_without_free_whitespace_json_is_spelled_as_json_dumps_does(compiler, tokenizer) -> None:
    """any_whitespace=False leaves exactly one spelling of the separators."""
    source = grammar.json_schema(SCHEMA, param="p", any_whitespace=False)
    text = generate(compiler.compile(source), tokenizer, 3)
    assert text == json.dumps(json.loads(text), ensure_ascii=False)


def test_a_regular_expression_holds_for_the_whole_output(compiler, tokenizer) -> None:
    """Every output matches from its first to its last character."""
    compiled = compiler.compile(grammar.regex(r"[a-c]{2,4}-[0-9]+x", param="p"))
    for seed in range(10):
        assert re.fullmatch(r"[a-c]{2,4}-[0-9]+x", generate(compiled, tokenizer, seed))


def test_a_choice_is_one_of_the_options(compiler, tokenizer) -> None:
    """Options with quotes, newlines and non-ASCII come out exactly, and each of them can."""
    options = ['say "hi"', "two\nlines", "Zürich", "a/b", "a"]
    compiled = compiler.compile(grammar.choice(options, param="p"))
    assert {generate(compiled, tokenizer, seed) for seed in range(60)} == set(options)


@pytest.mark.parametrize(
    "text", ['start: "yes" | "no" "!"', 'root ::= answer\nanswer ::= "yes" | "no" "!"'], ids=["lark", "gbnf"]
)
def test_grammars_come_in_two_spellings(compiler, tokenizer, text: str) -> None:
    """Lark and GBNF mean the same thing."""
    compiled = compiler.compile(grammar.free_grammar(text, param="p"))
    assert {generate(compiled, tokenizer, seed) for seed in range(20)} == {"yes", "no!"}


def test_json_object_is_an_object(compiler, tokenizer) -> None:
    """json_object never yields a bare list, number or string."""
    compiled = compiler.compile(grammar.json_object(param="p"))
    matcher = compiled.matcher()
    first = {tokenizer.id_to_token(token).lstrip("ĠĊĉč")[:1] for token in allowed(matcher)}
    assert first <= {"{", ""}


def test_sequences_do_not_share_state(compiler) -> None:
    """Two matchers of one grammar advance on their own."""
    compiled = compiler.compile(grammar.regex("ab", param="p"))
    one, two = compiled.matcher(), compiled.matcher()
    before = allowed(two)
    one.consume(before[:1])
    assert allowed(two) == before
    assert allowed(one) != before


@pytest.mark.parametrize("spelling", ["<|end|>", "<think>", "</tool_call>", "[INST]"])
def test_text_that_spells_an_added_token_can_be_forced(tokenizer, spelling) -> None:
    """Forced text is text, also where the tokenizer would make a token of it: an answer can be written to its end."""
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    inner.add_tokens(["<think>", "</tool_call>", "[INST]"])
    compiler = grammar.GrammarCompiler(inner.to_str(), vocab_size=333, eos_token_ids=[EOS])
    for text in (f"{spelling}x", f"a{spelling}", f"a {spelling}{spelling} "):
        for source, wanted in (
            (grammar.choice([text], param="p"), text),
            (grammar.regex(re.escape(text), param="p"), text),
            (grammar.json_schema({"const": text}, param="p"), json.dumps(text)),
        ):
            matcher, ids = compiler.compile(source).matcher(), []
            while (token := allowed(matcher)[-1]) != EOS:
                assert matcher.consume([token]) == 1
                ids.append(token)
            assert inner.decode(ids, skip_special_tokens=False) == wanted


def test_the_cache_is_bounded_and_remembers(compiler) -> None:
    """The same source compiles once; the least recently used one is forgotten."""
    kept = compiler.compile(grammar.regex("keep", param="p"))
    for i in range(20):
        compiler.compile(grammar.regex(f"x{i}", param="p"))
        assert compiler.compile(grammar.regex("keep", param="p")) is kept
    assert len(compiler) == 4
    compiler.compile(grammar.choice(["a" * 4000, "b"], param="p"))
    assert len(compiler) == 2, "one that is three times as large takes the place of three"


def test_a_tokenizer_may_have_more_ids_than_the_model(tokenizer) -> None:
    """Ids without a logit are left out of the mask, and nothing is written past its end."""
    compiler = grammar.GrammarCompiler(tokenizer.to_str(), vocab_size=tokenizer.get_vocab_size(), eos_token_ids=[EOS])
    matcher = compiler.compile(grammar.regex(".*", param="p")).matcher()
    whole, cut = np.zeros(-(-tokenizer.get_vocab_size() // 32), np.int32), np.zeros(16, np.int32)
    assert matcher.fill(whole.ctypes.data, whole.nbytes) is None
    assert matcher.fill(cut.ctypes.data, 4 * 4) is None
    assert cut[:4].tolist() == whole[:4].tolist() and cut[3] and not cut[4:].any()


def test_without_an_end_token_a_grammar_is_refused_by_name(tokenizer) -> None:
    """Nothing could end the answer, so the request is told at once and not when its grammar is complete."""
    compiler = grammar.GrammarCompiler(tokenizer.to_str(), vocab_size=333, eos_token_ids=[])
    with pytest.raises(InvalidRequestError, match=r"response_format cannot be used .* no end token"):
        compiler.compile(grammar.json_object(param="response_format"))


@pytest.mark.parametrize(
    ("blanks", "allowed"),
    [
        ("", True), (" ", True), ("\n", True), ("\n    ", True), ("\n" + " " * 24, True), ("\r\n\t\t", True),
        ("  ", False), ("\n\n", False), (" \n", False), ("\n" + " " * 25, False), ("\n \n", False),
    ],
)  # fmt: skip
def test_blanks_between_json_tokens_are_bounded(compiler, tokenizer, blanks: str, allowed: bool) -> None:
    """One space, or one line break with indentation, may stand between two tokens, and no more of it."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    matcher = compiler.compile(grammar.json_schema(schema, param="p")).matcher()
    ids = tokenizer.encode("{" + blanks + '"a":' + blanks + "1" + blanks + "}").ids
    assert (matcher.consume(ids) == len(ids)) == allowed


MANY = {f"p{i}": {"type": "string"} for i in range(1500)}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: grammar.json_schema("{", param="p"), "not JSON"),
        (lambda: grammar.json_schema([1], param="p"), "must be a JSON schema"),
        (lambda: grammar.json_schema({"type": 5}, param="p"), "type"),
        (lambda: grammar.json_schema({"$ref": "http://evil.example/x"}, param="p"), "retriev"),
        (lambda: grammar.json_schema({"type": "string", "pattern": "(?=a)b"}, param="p"), "look-around, including"),
        (lambda: grammar.regex("(?=a)b", param="p"), "look-around, including"),
        (lambda: grammar.regex("", param="p"), "empty"),
        (lambda: grammar.regex("[a", param="p"), "regex"),
        (lambda: grammar.regex(r"[^\x00-\U0010FFFF]", param="p"), "allows no output"),
        (lambda: grammar.regex("(" * 30_000 + "a" + ")" * 30_000, param="p"), "cannot be used"),
        (lambda: grammar.regex("a" * 70_000, param="p"), "too large"),
        (lambda: grammar.choice([], param="p"), "at least one"),
        (lambda: grammar.choice(["a", ""], param="p"), "empty"),
        (lambda: grammar.free_grammar("", param="p"), "empty"),
        (lambda: grammar.free_grammar("start: nothing", param="p"), "unknown name"),
        (lambda: grammar.free_grammar("start: " + "(" * 9_000 + '"a"' + ")" * 9_000, param="p"), "nested"),
        (lambda: grammar.free_grammar('root ::= "a', param="p"), "p "),
        (lambda: grammar.free_grammar('{"grammars": []}', param="p"), "neither"),
        (lambda: grammar.free_grammar("start: %json {", param="p"), "JSON behind %json"),
        (lambda: grammar.json_schema('{"items":' * 400 + "{}" + "}" * 400, param="p"), "recursion limit"),
        (lambda: grammar.json_schema({"$ref": "#"}, param="p"), "cannot be used"),
        (lambda: grammar.json_schema({"type": "object", "properties": MANY}, param="p"), "row has"),
    ],
)
def test_bad_and_bombing_grammars_are_refused_by_name(compiler, make, says: str) -> None:
    """A grammar that cannot be used is the client's error, names its field, and takes no process down."""
    with pytest.raises(InvalidRequestError, match=re.escape(says)) as caught:
        compiler.compile(make())
    assert caught.value.param == "p"


MULTIPLES = [
    {"type": "integer", "multipleOf": 10_000_019},
    {"type": "number", "multipleOf": 100.00019},
    {"multipleOf": 1e7},
    {"multipleOf": float("inf")},
    {"allOf": [{"multipleOf": 101}, {"properties": {"a": {"items": [{"multipleOf": 103}]}}}]},
    {"properties": {f"p{i}": {"multipleOf": 9_000} for i in range(3)}},
]


@pytest.mark.parametrize("schema", MULTIPLES)
def test_multiples_that_would_compile_for_minutes_are_refused(schema: dict[str, Any]) -> None:
    """A large multipleOf, or several with a large common multiple, is refused before the compiler sees it."""
    spellings = [
        lambda: grammar.json_schema(schema, param="p"),
        lambda: grammar.json_schema(json.dumps(schema).replace("multiple", "multipl\\u0065"), param="p"),
        lambda: grammar.free_grammar(f"start: %json {json.dumps(schema)}", param="p"),
        lambda: grammar.free_grammar(f"start: a\na: %json\n{json.dumps(schema)}", param="p"),
    ]
    for spelling in spellings:
        with pytest.raises(InvalidRequestError, match="multipleOf") as caught:
            spelling()
        assert caught.value.param == "p"


def test_ordinary_multiples_are_held_to(compiler, tokenizer) -> None:
    """Cents, dozens, and a property that is called multipleOf are no bombs."""
    schema = {
        "type": "object",
        "properties": {"multipleOf": {"type": "integer", "multipleOf": 12, "minimum": 0, "maximum": 999},
                       "price": {"enum": [1.5]}, "cents": {"type": "number", "multipleOf": 0.01, "maximum": 9}},
        "required": ["multipleOf", "price"], "additionalProperties": False,
    }  # fmt: skip
    compiled = compiler.compile(grammar.json_schema(schema, param="p", any_whitespace=False))
    for seed in range(5):
        assert json.loads(generate(compiled, tokenizer, seed))["multipleOf"] % 12 == 0


def test_a_choice_of_thousands(compiler, tokenizer) -> None:
    """As many options as a source may hold are one terminal: they compile, and one of them comes out."""
    options = [f"option {i}" for i in range(3_500)]
    assert generate(compiler.compile(grammar.choice(options, param="p")), tokenizer, 1) in options


def test_what_is_known_needs_no_compiling(compiler) -> None:
    """A grammar that is remembered is handed out at once; one that was refused or never seen is not."""
    source = grammar.regex("known", param="p")
    assert compiler.cached(source) is None
    assert compiler.compile(source) is compiler.cached(source)


def test_a_composed_grammar_blames_the_part_that_is_wrong(compiler) -> None:
    """Of several forms the field of the wrong one is named, whichever place it has."""
    wrong, right = grammar.regex("[a", param="wrong"), grammar.regex("a", param="right")
    for forms in ([wrong, right], [right, wrong]):
        with pytest.raises(InvalidRequestError) as caught:
            compiler.compile(grammar.compose(["start: @form_0 | @form_1"], forms))
        assert caught.value.param == "wrong"


def test_the_sign_of_a_multiple_does_not_count() -> None:
    """The compiler takes it for the number without a sign, so it would be busy for as long."""
    with pytest.raises(InvalidRequestError, match="multipleOf takes too long"):
        grammar.json_schema({"type": "integer", "multipleOf": -10_000_019}, param="json")
    with pytest.raises(InvalidRequestError, match="multipleOf takes too long"):
        grammar.free_grammar('start: %json {"multipleOf": -10000019}', param="grammar")


def test_a_schema_does_not_choose_its_separators() -> None:
    """The compiler's own options inside a schema would overrule ours, and the answer would be no JSON."""
    schema = {"type": "array", "items": {"const": 1}}
    plain = grammar.json_schema(schema, param="json")
    assert grammar.json_schema({**schema, "x-guidance": {"item_separator": ";"}}, param="json") == plain


def test_blanks_are_bounded_in_schemas_inside_grammars() -> None:
    """A model that writes nothing but blanks would do so in a %json of a client's grammar as well."""
    rule = grammar.free_grammar('start: "a" %json {"type": "object"} %json true', param="grammar").text
    assert json.loads(rule[rule.index("{") : rule.rindex("}") + 1])["x-guidance"] == grammar.json_options(True)
    assert rule.endswith("%json true")


def test_an_unknown_token_of_a_grammar_is_named_alone(compiler: grammar.GrammarCompiler) -> None:
    """The names under which control tokens are kept out of a grammar's text are no help to anybody."""
    with pytest.raises(InvalidRequestError, match=r'unknown special token: "<nope>"$'):
        compiler.compile(grammar.free_grammar("start: <nope>", param="grammar"))
