"""Compile response_format and structured_outputs to a grammar."""

from __future__ import annotations

from functools import partial

import trio

from trio_llm import grammar, params
from trio_llm.errors import InvalidRequestError, OverloadedError
from trio_llm.grammar import GrammarSource
from trio_llm.params import Grammar
from trio_llm.server.bodies.types import GenerationBody, ResponseFormat, StructuredOutputs
from trio_llm.server.constraints.rehearsal import rehearse, too_long
from trio_llm.server.services import Services

# llama.cpp's grammars are converted in Python: 64 KiB took 0.2 s, during which nothing else would run.
_LONG_GRAMMAR_CHARS = 2_000
_FORMS = ("json", "regex", "choice", "grammar", "json_object")


def output_grammar(form: ResponseFormat | None, structured: StructuredOutputs | None) -> GrammarSource | None:
    """Return the grammar of the output, None for free text.

    Raises:
        InvalidRequestError: Both fields are set, there is not exactly one form, or it is invalid.
    """
    if structured is None:
        return _from_response_format(form) if form is not None else None
    if form is not None and form.type != "text":
        raise InvalidRequestError("response_format and structured_outputs exclude each other.", "structured_outputs")
    return structured_grammar(structured)


async def requested_form(services: Services, body: GenerationBody) -> GrammarSource | None:
    """Return the grammar that a request asks for as `output_grammar` does; a long text is read off the event loop."""
    read = partial(output_grammar, body.response_format, body.structured_outputs)
    if body.structured_outputs is not None and len(body.structured_outputs.grammar or "") > _LONG_GRAMMAR_CHARS:
        return await services.compiling.run(read, is_long=False)
    return read()


def asks_for_form(body: GenerationBody) -> bool:
    """Return whether a request constrains the form of its output."""
    form = body.response_format
    return body.structured_outputs is not None or (form is not None and form.type != "text")


def _from_response_format(form: ResponseFormat) -> GrammarSource | None:
    if form.type != "json_schema" and form.json_schema is not None:
        raise InvalidRequestError("json_schema needs type 'json_schema'.", "response_format.json_schema")
    match form.type:
        case "text":
            return None
        case "json_object":
            return grammar.json_object(param="response_format")
        case "json_schema":
            if form.json_schema is None or form.json_schema.schema_ is None:
                where = "response_format.json_schema" + ("" if form.json_schema is None else ".schema")
                raise InvalidRequestError(f"Missing required parameter: '{where}'.", where)
            return grammar.json_schema(form.json_schema.schema_, param="response_format.json_schema.schema")


def structured_grammar(structured: StructuredOutputs | params.StructuredOutputs) -> GrammarSource:
    """Return the grammar of this form.

    Raises:
        InvalidRequestError: There is not exactly one form, or it is invalid.
    """
    # An empty value counts as present: a constraint must never be dropped because it is falsy.
    given = {name: value for name in _FORMS if (value := getattr(structured, name)) is not None}
    if len(given) != 1:
        raise InvalidRequestError(
            f"structured_outputs must have exactly one of {', '.join(_FORMS)}, not {len(given)}.", "structured_outputs"
        )
    ((name, value),) = given.items()
    param, loose = f"structured_outputs.{name}", not structured.disable_any_whitespace
    match name:
        case "json":
            return grammar.json_schema(value, param=param, any_whitespace=loose)
        case "regex":
            return grammar.regex(value, param=param)
        case "choice":
            return grammar.choice(value, param=param)
        case "grammar":
            return grammar.free_grammar(value, param=param)
        case _:
            if value is not True:
                raise InvalidRequestError(f"{param} = false asks for nothing: leave it out.", param)
            return grammar.json_schema({"type": "object"}, param=param, any_whitespace=loose)


async def compile_grammar(services: Services, source: GrammarSource) -> Grammar:
    """Compile off the event loop, in separate threads: a slow grammar delays only new grammars.

    Raises:
        InvalidRequestError: The grammar is invalid, or takes too long to compile.
        OverloadedError: Other grammars are still being compiled.
    """
    if (grammar := services.grammars.cached(source)) is not None:
        return grammar
    services.grammars.check(source)
    if not services.grammars.prepared:  # This does not count toward the grammar's own time.
        await services.compiling.run(services.grammars.prepare, abandon_on_cancel=True)
    begun = False

    limit_s = services.config.limits.grammar_timeout_s

    def work() -> Grammar:
        nonlocal begun
        begun = True
        rehearse(source, limit_s)
        return services.grammars.compile(source)

    with trio.move_on_after(limit_s):
        # An abandoned thread continues and occupies its place until its rehearsal has used up its time.
        return await services.compiling.run(work, abandon_on_cancel=True)
    if not begun:
        raise OverloadedError("Other grammars are still being compiled.", retry_after_s=limit_s)
    raise too_long(source, limit_s)
