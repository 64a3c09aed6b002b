"""Response templates: how a model writes the parts of its answers, as its tokenizer_config.json declares it.

The format is version 1 of transformers' `response_template`, without the content "python-call-list": fields, each with
delimiters, a form of its content, and a shape for the result. `ResponseParser` reads answers with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

import attrs
import msgspec
import regex
from msgspec import Struct

from trio_llm.server.parsing.reasoning import ThinkingForm
from trio_llm.server.parsing.response_values import TIMEOUT_S, check_shape, content_parser, shaped

Kind = Literal["content", "reasoning", "calls", "other"]
_KINDS: dict[str, Kind] = {
    "content": "content",
    "thinking": "reasoning",
    "reasoning": "reasoning",
    "reasoning_content": "reasoning",
    "tool_calls": "calls",
}
# The library unrolls counted repetition, in memory too: a{99999999} takes gigabytes.
_MAX_PATTERN_CHARS, _MAX_REPEATS = 512, 1000


class TemplateError(ValueError):
    """A template that cannot be used; names its field."""


class _FieldSpec(Struct, forbid_unknown_fields=True):
    open: str | list[str] | None = None
    open_pattern: str | None = None
    close: str | list[str] | None = None
    close_pattern: str | None = None
    content: Literal["text", "int", "float", "bool", "json", "xml-inline", "kv-lines"] = "text"
    content_args: dict[str, Any] = {}
    repeats: bool = False
    join: str | None = None
    optional: bool = True  # Without effect: an answer that lacks a field is not refused.
    transform: Any = None
    transform_each: bool = False


class _Spec(Struct, forbid_unknown_fields=True):
    fields: dict[str, _FieldSpec]
    version: Literal[1] = 1
    defaults: dict[str, Any] = {}  # Without effect: the role is always the assistant's.
    start_anchor: str | list[str] | None = None
    start_anchor_pattern: str | None = None


@attrs.frozen
class Delimiter:
    """What opens or closes a field.

    Attributes:
        literals: The texts that match; empty if only the pattern says which do.
        can_extend: A literal begins another one.
    """

    pattern: regex.Pattern[str]
    literals: tuple[str, ...] = ()
    can_extend: bool = False


@attrs.frozen
class Field:
    """A part of an answer.

    Attributes:
        kind: What it is to a client; "other" is dropped.
        open: None for the field that has all text outside of others.
        close: None if only the end closes it.
        is_text: The content is what clients get, without white space around it if `strips`.
        join: Between two of its texts.
        value: Turns the content and what the delimiters captured into a value. Raises ValueError if it cannot.
    """

    name: str
    kind: Kind
    open: Delimiter | None
    close: Delimiter | None
    is_text: bool
    strips: bool
    join: str
    value: Callable[[str, Mapping[str, str]], Any]


@attrs.frozen
class ResponseTemplate:
    """A checked template."""

    fields: tuple[Field, ...]
    start: Delimiter

    @classmethod
    def load(cls, spec: object) -> ResponseTemplate:
        """Check a template. Raises TemplateError."""
        try:
            given = msgspec.convert(spec, _Spec)
        except msgspec.ValidationError as error:
            raise TemplateError(str(error)) from None
        start = _delimiter("", "start_anchor", given.start_anchor, given.start_anchor_pattern)
        if start is None:
            raise TemplateError("start_anchor is missing")
        fields = tuple(_field(name, field) for name, field in given.fields.items())
        implicit = [field.name for field in fields if field.open is None]
        if len(implicit) > 1 or not fields:
            raise TemplateError(f"fields: one may have no open, not {' and '.join(implicit) or 'none of none'}")
        return cls(fields, start)

    @cached_property
    def implicit(self) -> Field | None:
        """The field of the text outside of others; None drops that text."""
        return next((field for field in self.fields if field.open is None), None)

    @property
    def has_calls(self) -> bool:
        return any(field.kind == "calls" for field in self.fields)

    @property
    def dropped(self) -> list[str]:
        """The fields that no API has."""
        return [field.name for field in self.fields if field.kind == "other"]

    @property
    def thinking(self) -> ThinkingForm | None:
        """The markers around thinking, if they are texts."""
        for field in self.fields:
            markers = [one.literals[0] for one in (field.open, field.close) if one is not None and one.literals]
            if field.kind == "reasoning" and len(markers) == 2:
                return ThinkingForm(*markers)
        return None

    def answer_begins(self, prompt: str) -> str:
        """Return the part of a prompt that already belongs to the answer. Call it in a thread."""
        try:
            ends = [match.end() for match in self.start.pattern.finditer(prompt, timeout=TIMEOUT_S)]
        except TimeoutError:
            ends = []
        return prompt[ends[-1] :] if ends else ""


def _field(name: str, spec: _FieldSpec) -> Field:
    where = f"fields.{name}."
    opens = _delimiter(where, "open", spec.open, spec.open_pattern)
    close = _delimiter(where, "close", spec.close, spec.close_pattern)
    if spec.join is not None and not spec.repeats:
        raise TemplateError(f"{where}join needs repeats")
    if spec.transform_each and spec.transform is None:
        raise TemplateError(f"{where}transform_each needs transform")
    try:
        parse = content_parser(spec.content, spec.content_args)
        check_shape(spec.transform)
    except ValueError as error:
        raise TemplateError(f"{where}{error}") from None

    def value(text: str, captures: Mapping[str, str]) -> Any:
        return shaped(parse(text), spec.transform, captures, each=spec.transform_each)

    return Field(
        name,
        _KINDS.get(name, "other"),
        opens,
        close,
        is_text=spec.content not in ("json", "xml-inline", "kv-lines") and spec.transform is None,
        strips=spec.content_args.get("strip", True) is not False,
        join="\n" if spec.join is None else spec.join,
        value=value,
    )


def _delimiter(where: str, name: str, literal: str | list[str] | None, pattern: str | None) -> Delimiter | None:
    if literal is not None and pattern is not None:
        raise TemplateError(f"{where}{name} and {where}{name}_pattern exclude each other")
    if pattern is not None:
        return Delimiter(compiled(pattern, f"{where}{name}_pattern"))
    if literal is None:
        return None
    literals = [literal] if isinstance(literal, str) else sorted(set(literal), key=len, reverse=True)
    if not all(literals) or sum(map(len, literals)) > _MAX_PATTERN_CHARS:
        raise TemplateError(f"{where}{name} must have texts of 1 to {_MAX_PATTERN_CHARS} characters in all")
    can_extend = any(one != other and one.startswith(other) for one in literals for other in literals)
    return Delimiter(regex.compile("|".join(map(regex.escape, literals))), tuple(literals), can_extend)


def compiled(pattern: str, where: str) -> regex.Pattern[str]:
    """Compile a template's regular expression. Raises TemplateError if it is invalid, or would take much memory."""
    counts = [int(digits) for digits in re.findall(r"\{[^{}]*?([0-9]{1,9})\}", pattern)]
    if len(pattern) > _MAX_PATTERN_CHARS or math.prod(counts) > _MAX_REPEATS or re.search(r"[0-9]{5}", pattern):
        raise TemplateError(f"{where} is too long or repeats too often")
    try:
        return regex.compile(pattern, regex.DOTALL)
    except (regex.error, RecursionError) as error:
        raise TemplateError(f"{where}: {error}") from None
