"""What structured output costs with a large vocabulary: indexing it, compiling a grammar, and one mask.

    python benchmarks/grammars.py [--tokens 151000]

The vocabulary is made up: byte-level BPE tokens of 1 to 14 characters. Every grammar runs 60 tokens, drawn among those
that it allows. The hostile ones are what a client could send to keep a server busy.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Callable

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from trio_llm import grammar
from trio_llm.errors import InvalidRequestError
from trio_llm.grammar import GrammarCompiler, GrammarSource

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age"],
}
TREE = {"type": "object", "properties": {"left": {"$ref": "#/$defs/n"}, "right": {"$ref": "#/$defs/n"}}}
EITHER = [
    {"anyOf": [{"properties": {f"a{j}_{i}": {"const": i}}, "required": [f"a{j}_{i}"]} for i in range(6)]}
    for j in range(8)
]
MANY = {f"p{i}": {"type": "string"} for i in range(1500)}


def nested(levels: int) -> str:
    """Return a schema of objects in objects."""
    return '{"type":"object","properties":{"a":' * levels + "{}" + "}}" * levels


def schema(value: object) -> GrammarSource:
    """Return the grammar of a JSON schema."""
    return grammar.json_schema(value, param="schema")


def regex(pattern: str) -> GrammarSource:
    """Return the grammar of a regular expression."""
    return grammar.regex(pattern, param="regex")


GRAMMARS: dict[str, Callable[[], GrammarSource]] = {
    "schema of a person": lambda: schema(PERSON),
    "any JSON object": lambda: grammar.json_object(param="x"),
    "choice of 3": lambda: grammar.choice(["red", "green", "blue"], param="x"),
    "`(a+)+b`": lambda: regex("(a+)+b"),
    "`a{1,1000000}`": lambda: regex("a{1,1000000}"),
    "`(.\\|\\n)*a(.\\|\\n){300}`": lambda: regex("(.|\n)*a(.|\n){300}"),
    "`((a{1,1000}){1,1000}){1,1000}`": lambda: regex("((a{1,1000}){1,1000}){1,1000}"),
    "3,000 alternatives with counts": lambda: regex("|".join(f"w{i}x[a-z]{{1,{i % 50 + 1}}}" for i in range(3000))),
    "choice of 6,000": lambda: grammar.choice([f"v{i}" for i in range(6000)], param="x"),
    "choice of 20,000": lambda: grammar.choice([f"v{i}" for i in range(20_000)], param="x"),
    "enum of 5,000": lambda: schema({"enum": [f"v{i}" for i in range(5000)]}),
    "1,500 optional properties": lambda: schema({"type": "object", "properties": MANY}),
    "1,000 levels": lambda: schema(nested(1000)),
    "recursive `$ref`": lambda: schema({"$defs": {"n": TREE}, "$ref": "#/$defs/n"}),
    "`$ref` to itself": lambda: schema({"$ref": "#"}),
    "8 anyOf of 6 in an allOf": lambda: schema({"type": "object", "allOf": EITHER}),
    "40 patternProperties": lambda: schema({"patternProperties": {f"^(a|b)*a(a|b){{{i}}}$": {} for i in range(40)}}),
    "minItems 1,000,000": lambda: schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    "minLength 1,000,000": lambda: schema({"type": "string", "minLength": 10**6}),
    "multipleOf 9,973": lambda: schema({"type": "integer", "multipleOf": 9973}),
    "multipleOf 10,000,019": lambda: schema({"type": "integer", "multipleOf": 10_000_019}),
    'ambiguous `e: e e \\| "a" \\|`': lambda: grammar.free_grammar('start: e\ne: e e | "a" |', param="x"),
}


def made_up_tokenizer(num_tokens: int) -> str:
    """Return tokenizer.json with so many tokens, the last one the end of text."""
    dice = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    common = [c for c in alphabet if c.isascii() and (c.isalnum() or c in '{}[]",:.-_')] + ["Ġ"] * 6
    vocab, tokens, merges = {a: i for i, a in enumerate(alphabet)}, list(alphabet), []
    while len(tokens) < num_tokens - 1:
        pair = dice.choice(tokens if dice.random() < 0.5 else common), dice.choice(common)
        if len(merged := "".join(pair)) <= 14 and merged not in vocab:
            vocab[merged] = len(tokens)
            tokens.append(merged)
            merges.append(pair)
    inner = Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return inner.to_str()


def masks(compiled: grammar.Grammar, vocab_size: int) -> tuple[float, str]:
    """Write 60 tokens; return the slowest mask in seconds, and why it ended early, if it did."""
    matcher, mask = compiled.matcher(), np.zeros((vocab_size + 31) // 32, np.int32)
    dice, slowest = np.random.default_rng(0), 0.0
    for _ in range(60):
        began = time.perf_counter()
        error = matcher.fill(mask.ctypes.data, mask.nbytes)
        slowest = max(slowest, time.perf_counter() - began)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        allowed = allowed[allowed < vocab_size - 1]
        if error or not len(allowed):
            return slowest, f"; then the request fails: {error.splitlines()[0][:60]}" if error else ""
        matcher.consume([int(dice.choice(allowed))])
    return slowest, ""


def main() -> None:
    """Print the table of docs/serving.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=151_000)
    num_tokens = parser.parse_args().tokens
    compiler = GrammarCompiler(made_up_tokenizer(num_tokens), vocab_size=num_tokens, eos_token_ids=[num_tokens - 1])
    began, before = time.perf_counter(), _peak_mib()
    compiler.prepare()
    print(f"{num_tokens} tokens indexed in {time.perf_counter() - began:.1f} s, {_peak_mib() - before} MiB\n")
    print("| grammar | compiled in, ms | slowest mask, ms | outcome |\n|---|---|---|---|")
    for name, make in GRAMMARS.items():
        began = time.perf_counter()
        try:
            compiled = compiler.compile(make())
            taken = time.perf_counter() - began
            slowest, end = masks(compiled, num_tokens)
            print(f"| {name} | {taken * 1e3:.1f} | {slowest * 1e3:.1f} | served{end} |", flush=True)
        except InvalidRequestError:
            print(f"| {name} | {(time.perf_counter() - began) * 1e3:.1f} | | 400 |", flush=True)
    print(f"\nMemory grew by {_peak_mib() - before} MiB over all of it.")


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
