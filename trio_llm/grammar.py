"""Structured output: JSON schemas, regular expressions, choices and grammars, as masks over the vocabulary.

llguidance does the parsing; this file bounds it, caches it and turns its refusals into errors that name the field.
Sources are made and compiled on the server's side, away from the event loop; the runner only asks a matcher which
tokens may come next and tells it which one came. Knows no server, no model and no torch.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import attrs

from trio_llm.errors import InvalidRequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# With this and the two bounds below, compiling for 150,000 tokens took up to 1.3 s over a set of hostile grammars, one
# mask up to 23 ms, and no memory to speak of (benchmarks/grammars.py, on two busy cores).
MAX_SOURCE_BYTES = 64 * 1024

# llguidance bounds its own work by fuel, except that of multipleOf: it builds a state per remainder, 16 us each, and
# 10,000,019 keeps it busy for many minutes. Schemas are merged, so what counts is the least common multiple.
MAX_MULTIPLE = 10_000
MAX_SUM_OF_MULTIPLES = 20_000


@attrs.frozen
class GrammarSource:
    """A grammar as llguidance reads it, and the request field it came from, for error messages.

    Attributes:
        forms: The grammars that it was put together from, if it was.
    """

    text: str
    param: str
    forms: tuple[GrammarSource, ...] = ()


def json_schema(schema: Any, *, param: str, any_whitespace: bool = True) -> GrammarSource:
    """Constrain the output to JSON that satisfies a schema (an object, a boolean, or the text of one)."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    _check_size(text, param)
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"{param} is not JSON: {error}.", param) from None
    except RecursionError:
        raise InvalidRequestError(f"{param} is nested too deeply.", param) from None
    if parsed is False:
        raise InvalidRequestError(f"{param} = false allows no output at all.", param)
    check_multiples(parsed, param)
    if parsed is True:
        parsed = {}
    elif not isinstance(parsed, dict):
        raise InvalidRequestError(f"{param} must be a JSON schema (an object), not {type(parsed).__name__}.", param)
    text = json.dumps(parsed)  # What was looked at is what is compiled, also where the text has a key twice.
    try:
        return GrammarSource(_matcher().grammar_from_json_schema(text, overrides=_json_options(any_whitespace)), param)
    except ValueError as error:  # It counts levels too, and allows fewer.
        raise InvalidRequestError(f"{param} cannot be used: {_first_line(error)}.", param) from None


def json_object(*, param: str) -> GrammarSource:
    """Constrain the output to one JSON object of any shape."""
    return json_schema({"type": "object"}, param=param)


def regex(pattern: str, *, param: str) -> GrammarSource:
    """Constrain the whole output to a regular expression (Rust's syntax: linear time, no look-around)."""
    if not pattern:
        raise InvalidRequestError(f"{param} must not be empty.", param)
    return GrammarSource(_matcher().grammar_from_regex(pattern), param)


def choice(options: Sequence[str], *, param: str) -> GrammarSource:
    """Constrain the output to one of several strings."""
    if not options or not all(options):
        raise InvalidRequestError(f"{param} must be a list of at least one string, none of them empty.", param)
    # One terminal: as a rule of its own, each would be one more way to go on that the parser has to keep in view.
    return lark(["start: CHOICE", "CHOICE: " + " | ".join(json.dumps(option) for option in options)], param=param)


def lark(rules: Sequence[str], *, param: str) -> GrammarSource:
    """Constrain the output to a context-free grammar in llguidance's Lark dialect."""
    return GrammarSource("\n".join(rules), param)


def compose(rules: Sequence[str], forms: Sequence[GrammarSource]) -> GrammarSource:
    """Put grammars together by Lark rules, which call each of them `@` and its `form_name`."""
    parts: list[dict[str, Any]] = [{"lark_grammar": "\n".join(rules)}]
    for index, form in enumerate(forms):
        first, *others = json.loads(form.text)["grammars"] if form.text[:1] == "{" else [{"lark_grammar": form.text}]
        parts += [{**first, "name": form_name(index)}, *others]
    return GrammarSource(json.dumps({"grammars": parts}), forms[-1].param, tuple(forms))


def form_name(index: int) -> str:
    """Return by what name the rules of a composed grammar call one of its parts."""
    return f"form_{index}"


def free_grammar(grammar: str, *, param: str) -> GrammarSource:
    """Constrain the output to a grammar that a client wrote: Lark as above, or GBNF as llama.cpp writes it."""
    if not grammar.strip():
        raise InvalidRequestError(f"{param} must not be empty.", param)
    _check_size(grammar, param)
    if grammar.lstrip().startswith("{"):  # The compiler would take it for its own way to write several grammars.
        raise InvalidRequestError(f"{param} is neither a Lark nor a GBNF grammar.", param)
    for start in re.finditer(r"%json\s*", grammar):
        try:
            check_multiples(json.JSONDecoder().raw_decode(grammar, start.end())[0], param)
        except (ValueError, RecursionError):
            raise InvalidRequestError(f"{param} has something else than JSON behind %json.", param) from None
    if "::=" in grammar:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            grammar = gbnf_to_lark(grammar)
        except Exception as error:  # noqa: BLE001 - a converter of untrusted text; every refusal is the client's error
            raise InvalidRequestError(f"{param} is not a grammar: {_first_line(error)}", param) from None
    return GrammarSource(_matcher().grammar_from_lark(grammar), param)


def check_multiples(schema: Any, param: str) -> None:
    """Refuse schemas, at any depth, whose multipleOf would take minutes to compile.

    Raises:
        InvalidRequestError: Names the field.
    """
    found = list(_multiples(schema))
    if sum(found) > MAX_SUM_OF_MULTIPLES or math.lcm(*set(found)) > MAX_MULTIPLE:
        raise InvalidRequestError(
            f"{param} cannot be used: multipleOf takes too long to hold to, above {MAX_MULTIPLE} (what is divisible by "
            f"several counts as their least common multiple) or above {MAX_SUM_OF_MULTIPLES} in all.",
            param,
        )


def _multiples(schema: Any) -> Iterator[int]:
    """Yield every multipleOf as a whole number, without its decimal point."""
    waiting: list[Any] = [schema]
    while waiting:
        match waiting.pop():
            case dict() as node:
                waiting += cast("dict[str, Any]", node).values()
                match cast("dict[str, Any]", node).get("multipleOf"):
                    case int() | float() as value if value > 0:
                        number = Decimal(str(value)).as_tuple()
                        yield int("".join(map(str, number.digits))) * 10 ** max(int(number.exponent), 0)
                    case _:
                        pass  # A property of this name, or what the compiler refuses.
            case list() as items:
                waiting += cast("list[Any]", items)
            case _:
                pass


class Matcher:
    """The state of one sequence in its grammar. Used by the runner's thread alone."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill(self, address: int, num_bytes: int) -> str | None:
        """Write which tokens may come next, a bit per token id, little-endian; return why it cannot, or None."""
        self._matcher.unsafe_compute_mask_ptr(address, num_bytes)
        return self._matcher.get_error() or None

    def consume(self, token_ids: Sequence[int]) -> int:
        """Advance past tokens up to the first that may not come; return how many that were."""
        return self._matcher.try_consume_tokens(list(token_ids))

    def rollback(self, num_tokens: int) -> None:
        """Go back to where it was before the last tokens that it consumed."""
        self._matcher.rollback(num_tokens)


class Grammar:
    """A compiled grammar. Sequences that share it each take a matcher of their own."""

    def __init__(self, prototype: LLMatcher) -> None:
        self._prototype = prototype
        self._lock = threading.Lock()  # A matcher must not be copied by two threads at once.

    def matcher(self) -> Matcher:
        with self._lock:
            return Matcher(self._prototype.deep_copy())


class GrammarCompiler:
    """Compiles grammars for one vocabulary and remembers the most recent ones. Thread-safe.

    Args:
        tokenizer_json: The text of tokenizer.json.
        vocab_size: Rows of the logits, which may be more than the tokenizer knows.
        eos_token_ids: Allowed where the grammar is complete.
        capacity: Grammars remembered.
    """

    def __init__(
        self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: Sequence[int], capacity: int = 128
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._capacity = capacity
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._preparing = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    @property
    def prepared(self) -> bool:
        return self._vocabulary is not None

    def prepare(self) -> LLTokenizer:
        """Index the vocabulary, once: seconds for one of 150,000 tokens, so call it from a worker thread."""
        from llguidance import LLTokenizer

        with self._preparing:
            if self._vocabulary is None:
                eos = self._eos_token_ids
                self._vocabulary = LLTokenizer(self._tokenizer_json, n_vocab=self._vocab_size, eos_token=eos)
            return self._vocabulary

    def known(self, source: GrammarSource) -> Grammar | None:
        """Return a grammar that was compiled already and is remembered. Takes microseconds."""
        with self._lock:
            if (grammar := self._compiled.get(source.text)) is not None:
                self._compiled.move_to_end(source.text)
            return grammar

    def compile(self, source: GrammarSource) -> Grammar:
        """Return the grammar, ready to be matched. Blocks for milliseconds: call it from a worker thread.

        Raises:
            InvalidRequestError: It is too large, too deep, or not a grammar; names the field.
        """
        _check_size(source.text, source.param)
        if (known := self.known(source)) is not None:
            return known
        prototype = _matcher()(self.prepare(), source.text, log_level=0, limits=self._limits)
        if error := prototype.get_error() or _error_at_start(prototype):
            for form in source.forms:
                self.compile(form)  # If one of them is to blame, its own field is named.
            raise InvalidRequestError(f"{source.param} cannot be used: {_first_line(error)}", source.param)
        grammar = Grammar(prototype)
        with self._lock:
            self._compiled[source.text] = grammar
            while len(self._compiled) > self._capacity:
                self._compiled.popitem(last=False)
        return grammar

    def __len__(self) -> int:
        return len(self._compiled)

    @cached_property
    def _limits(self) -> LLParserLimits:
        from llguidance import LLParserLimits

        return LLParserLimits(verbose_errors=False)


def _error_at_start(prototype: LLMatcher) -> str:
    """Return why not even the first tokens can be found: some bombs only go off when they are used."""
    trial = prototype.deep_copy()
    first = int.from_bytes(trial.compute_bitmask(), "little")
    if first:
        trial.consume_token((first & -first).bit_length() - 1)
        trial.compute_bitmask()
    return trial.get_error()


def _check_size(text: str, param: str) -> None:
    if (size := len(text.encode())) > MAX_SOURCE_BYTES:
        raise InvalidRequestError(
            f"{param} is too large: {size} bytes as a grammar, at most {MAX_SOURCE_BYTES}.", param
        )


def _matcher() -> type[LLMatcher]:
    from llguidance import LLMatcher

    return LLMatcher


def _json_options(any_whitespace: bool) -> JsonCompileOptions:
    # Without free whitespace the separators are those of json.dumps, which is what models were trained on.
    return (
        {"whitespace_flexible": True}
        if any_whitespace
        else {
            "whitespace_flexible": False,
            "item_separator": ", ",
            "key_separator": ": ",
        }
    )


def _first_line(error: object) -> str:
    return str(error).splitlines()[0][:300]
