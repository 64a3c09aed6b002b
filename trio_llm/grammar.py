"""Structured output: JSON schemas, regular expressions, choices and grammars, as masks over the vocabulary.

llguidance does the parsing; this module bounds it, caches grammars and turns its errors into ones that name the field.
The server makes and compiles sources, off the event loop; the runner asks a matcher for the allowed tokens and passes
it the sampled ones. This module is independent of server, model and torch.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import attrs

from trio_llm.errors import InvalidRequestError
from trio_llm.tokenizer import unspellable

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


# Bound of the cache of compiled grammars, by this estimate: 64 KiB and 32 bytes per byte of source. Measured with
# vocabularies of 150,000 and 262,000: 45 to 90 KiB for schemas of 230 bytes, 1.6 MB for 59 KB of alternatives.
MAX_CACHE_BYTES = 64 * 2**20
_BYTES_PER_GRAMMAR, _BYTES_PER_SOURCE_BYTE = 64 * 2**10, 32

# White space between two tokens of JSON: one space, or a line break and indentation. Without a bound a weak model may
# write nothing else: half of the answers of a 135M model did.
_JSON_BLANKS = r"( |\r?\n[ \t]{0,24})"
OPTIONS = "x-guidance"
"""The key of a schema under which llguidance finds its options."""


@attrs.frozen
class GrammarSource:
    """A grammar in llguidance's format, and its request field, for error messages.

    Attributes:
        forms: The grammars that it is composed of, if any.
        part: Which part of the field it is, for error messages.
    """

    text: str
    param: str
    forms: tuple[GrammarSource, ...] = ()
    part: str | None = None


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
    parsed.pop(OPTIONS, None)  # It would overrule ours: other separators than JSON's, for example.
    text = json.dumps(parsed)  # Compile what was checked: the original text may have duplicate keys.
    try:
        return GrammarSource(_matcher().grammar_from_json_schema(text, overrides=json_options(any_whitespace)), param)
    except ValueError as error:  # It counts levels too, and allows fewer.
        raise InvalidRequestError(f"{param} cannot be used: {_first_line(error)}.", param) from None


def json_options(any_whitespace: bool) -> JsonCompileOptions:
    """Return how JSON is written: with bounded blanks, or as json.dumps does, as in models' training data."""
    if any_whitespace:
        return {"whitespace_flexible": True, "whitespace_pattern": _JSON_BLANKS}
    return {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


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
    # Check before half a million options are written out: each takes at least quotes and a bar.
    _check_bytes(sum(map(len, options)) + 5 * len(options), param)
    # One terminal: as a rule of its own, each would be one more way to go on that the parser has to keep in view.
    return lark(["start: CHOICE", "CHOICE: " + " | ".join(json.dumps(option) for option in options)], param=param)


def lark(rules: Sequence[str], *, param: str, forms: Sequence[GrammarSource] = ()) -> GrammarSource:
    """Constrain the output to a context-free grammar in llguidance's Lark dialect.

    Args:
        rules: Of the grammar, a line each.
        forms: What the rules contain, so that an error names the part that is wrong.
    """
    return GrammarSource("\n".join(rules), param, tuple(forms))


def json_part(schema: Mapping[str, Any], *, param: str, part: str) -> GrammarSource:
    """Return the grammar of a JSON schema that is a part of a field."""
    return GrammarSource(json.dumps({"grammars": [{"json_schema": schema}]}), param, part=part)


def compose(rules: Sequence[str], forms: Sequence[GrammarSource]) -> GrammarSource:
    """Compose grammars by Lark rules, which refer to each as `@` and its `form_name`."""
    parts: list[dict[str, Any]] = [{"lark_grammar": "\n".join(rules)}]
    for index, form in enumerate(forms):
        first, *others = json.loads(form.text)["grammars"] if form.text[:1] == "{" else [{"lark_grammar": form.text}]
        parts += [{**first, "name": form_name(index)}, *others]
    return GrammarSource(json.dumps({"grammars": parts}), forms[-1].param, tuple(forms))


def form_name(index: int) -> str:
    """Return the name of a part in the rules of a composed grammar."""
    return f"form_{index}"


def free_grammar(grammar: str, *, param: str) -> GrammarSource:
    """Constrain the output to a client's grammar: Lark as above, or llama.cpp's GBNF."""
    if not grammar.strip():
        raise InvalidRequestError(f"{param} must not be empty.", param)
    _check_size(grammar, param)
    if grammar.lstrip().startswith("{"):  # The compiler would parse it as its own format of several grammars.
        raise InvalidRequestError(f"{param} is neither a Lark nor a GBNF grammar.", param)
    grammar = _with_checked_schemas(grammar, param)
    if "::=" in grammar:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            grammar = gbnf_to_lark(grammar)
        except Exception as error:  # noqa: BLE001 - a converter of untrusted text; every refusal is the client's error
            raise InvalidRequestError(f"{param} is not a grammar: {_first_line(error)}", param) from None
    return GrammarSource(_matcher().grammar_from_lark(grammar), param)


def _with_checked_schemas(grammar: str, param: str) -> str:
    """Return a Lark grammar whose %json schemas are those that were checked, with bounded blanks by default."""
    pieces: list[str] = []
    end = 0
    for start in re.finditer(r"%json\s*", grammar):
        if start.start() < end:  # Inside a schema.
            continue
        try:
            schema, after = json.JSONDecoder().raw_decode(grammar, start.end())
            check_multiples(schema, param)
        except (ValueError, RecursionError):
            raise InvalidRequestError(f"{param} has something else than JSON behind %json.", param) from None
        if isinstance(schema, dict):
            schema = {OPTIONS: json_options(any_whitespace=True), **cast("dict[str, Any]", schema)}
        pieces += [grammar[end : start.end()], json.dumps(schema)]
        end = after
    return "".join([*pieces, grammar[end:]])


def check_multiples(schema: Any, param: str) -> None:
    """Refuse schemas with a multipleOf, at any depth, that would take minutes to compile.

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
    """Yield every multipleOf as an integer, without its decimal point."""
    waiting: list[Any] = [schema]
    while waiting:
        match waiting.pop():
            case dict() as node:
                waiting += cast("dict[str, Any]", node).values()
                match cast("dict[str, Any]", node).get("multipleOf"):
                    case int() | float() as value if math.isinf(value):
                        yield MAX_MULTIPLE + 1  # Only a grammar of the client's own can spell it.
                    case int() | float() as value if value != 0:  # The sign does not count for the compiler either.
                        number = Decimal(str(value)).as_tuple()
                        yield int("".join(map(str, number.digits))) * 10 ** max(int(number.exponent), 0)
                    case _:
                        pass  # A property of this name, or what the compiler refuses.
            case list() as items:
                waiting += cast("list[Any]", items)
            case _:
                pass


class Matcher:
    """The state of one sequence in its grammar. Only the runner's thread uses it."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._mask_bytes = 4 * -(-vocab_size // 32)

    def fill(self, address: int, num_bytes: int) -> str | None:
        """Write the allowed next tokens, a bit per token id, little-endian; return an error or None.

        Ids beyond `num_bytes` are left out: a tokenizer may have more of them than the model has logits.
        """
        if num_bytes < self._mask_bytes:
            ctypes.memmove(address, self._matcher.compute_bitmask(), num_bytes)
        else:
            self._matcher.unsafe_compute_mask_ptr(address, num_bytes)
        return self._matcher.get_error() or None

    def consume(self, token_ids: Sequence[int]) -> int:
        """Consume tokens up to the first that is not allowed; return the number consumed."""
        return self._matcher.try_consume_tokens(list(token_ids))

    def rollback(self, num_tokens: int) -> None:
        """Roll back the last `num_tokens` consumed tokens."""
        self._matcher.rollback(num_tokens)


class Grammar:
    """A compiled grammar. Each sequence has its own matcher."""

    def __init__(self, prototype: LLMatcher, vocab_size: int) -> None:
        self._prototype, self._vocab_size = prototype, vocab_size
        self._lock = threading.Lock()  # Two threads must not copy a matcher at once.

    def matcher(self) -> Matcher:
        with self._lock:
            return Matcher(self._prototype.deep_copy(), self._vocab_size)


class GrammarCompiler:
    """Compiles grammars for one vocabulary and caches the most recently used. Thread-safe.

    Args:
        tokenizer_json: The text of tokenizer.json.
        vocab_size: Number of token ids of the model or the tokenizer, whichever is larger.
        eos_token_ids: Allowed when the grammar is complete.
        max_bytes: Bound of the cache, as estimated.
    """

    def __init__(
        self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: Sequence[int], max_bytes: int = MAX_CACHE_BYTES
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._preparing = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    @property
    def prepared(self) -> bool:
        return self._vocabulary is not None

    def prepare(self) -> LLTokenizer:
        """Index the vocabulary, once: seconds for one of 150,000 tokens, most of them without releasing the GIL.

        A server calls it before it listens.
        """
        from llguidance import LLTokenizer

        with self._preparing:
            if self._vocabulary is None:
                eos = self._eos_token_ids
                text = unspellable(self._tokenizer_json)
                self._vocabulary = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos)
            return self._vocabulary

    def cached(self, source: GrammarSource) -> Grammar | None:
        """Return a cached grammar, None if it is not cached. Takes microseconds."""
        with self._lock:
            if (grammar := self._compiled.get(source.text)) is not None:
                self._compiled.move_to_end(source.text)
            return grammar

    def check(self, source: GrammarSource) -> None:
        """Refuse what need not be compiled for that. Takes microseconds.

        Raises:
            InvalidRequestError: It is too large, or the model has no end token; names the field.
        """
        if not self._eos_token_ids:
            raise InvalidRequestError(
                f"{source.param} cannot be used with this model: it names no end token, so nothing could follow the "
                "last token of the grammar (eos_token_id of config.json or generation_config.json).",
                source.param,
            )
        _check_size(source.text, source.param)

    def compile(self, source: GrammarSource) -> Grammar:
        """Return the grammar, ready to be matched. Blocks for milliseconds: call it from a worker thread.

        Raises:
            InvalidRequestError: As `check`, or it is too deep or invalid; names the field.
        """
        self.check(source)
        if (grammar := self.cached(source)) is not None:
            return grammar
        prototype = _matcher()(self.prepare(), source.text, log_level=0, limits=self._limits)
        if error := prototype.get_error() or _error_at_start(prototype):
            for form in source.forms:
                self.compile(form)  # An error in one of them names its own field.
            named = source.param if source.part is None else f"{source.param}: {source.part}"
            raise InvalidRequestError(f"{named} cannot be used: {_first_line(error)}", source.param)
        grammar = Grammar(prototype, self._vocab_size)
        self._remember(source.text, grammar)
        return grammar

    def _remember(self, text: str, grammar: Grammar) -> None:
        """Cache a grammar, and evict the least recently used ones."""
        with self._lock:
            if text not in self._compiled:
                self._num_bytes += _estimated_bytes(text)
            self._compiled[text] = grammar
            while self._num_bytes > self._max_bytes:
                forgotten, _ = self._compiled.popitem(last=False)
                self._num_bytes -= _estimated_bytes(forgotten)

    def __len__(self) -> int:
        return len(self._compiled)

    @cached_property
    def _limits(self) -> LLParserLimits:
        from llguidance import LLParserLimits

        return LLParserLimits(verbose_errors=False)


def _estimated_bytes(text: str) -> int:
    return _BYTES_PER_GRAMMAR + _BYTES_PER_SOURCE_BYTE * len(text)


def _error_at_start(prototype: LLMatcher) -> str:
    """Return why the first mask cannot be computed: some hostile grammars fail only when they are used."""
    trial = prototype.deep_copy()
    first = int.from_bytes(trial.compute_bitmask(), "little")
    if first:
        trial.consume_token((first & -first).bit_length() - 1)
        trial.compute_bitmask()
    return trial.get_error()


def _check_size(text: str, param: str) -> None:
    _check_bytes(len(text.encode()), param)


def _check_bytes(size: int, param: str) -> None:
    if size > MAX_SOURCE_BYTES:
        raise InvalidRequestError(
            f"{param} is too large: {size} bytes as a grammar, at most {MAX_SOURCE_BYTES}.", param
        )


def _matcher() -> type[LLMatcher]:
    from llguidance import LLMatcher

    return LLMatcher


def _first_line(error: object) -> str:
    line, *more = str(error).splitlines()
    line = line.partition("; following special tokens")[0][:300]  # They have names that nobody can spell.
    if line.endswith("regex parse error:"):  # What is wrong stands below a drawing of where.
        line = " ".join([line, *(reason.removeprefix("error: ") for reason in more if reason.startswith("error: "))])[
            :400
        ]
    return "it allows no output at all" if line == "NoExtensionBias" else line
