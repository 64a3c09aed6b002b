"""Jinja in transformers' configuration for chat templates, sandboxed, with literals marked as the template's text."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from typing import Any, NoReturn, cast

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from trio_llm.server.templates import provenance


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Compiles literals and concatenation to functions of the environment: Jinja's own lose the marks."""

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.from_template({super()._output_const_repr(group)})"

    def visit_Const(self, node: jinja2.nodes.Const, frame: jinja2.compiler.Frame) -> None:  # noqa: N802 - jinja2's name
        self.write(_literal(node.as_const(frame.eval_ctx)))

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:  # noqa: N802 - as above
        self.write("environment.concat(map(str, (")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write(")))")


def _literal(value: Any) -> str:
    """Return Python source for a constant, with text marked as the template's."""
    if type(value) is str:
        return f"environment.from_template({value!r})"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, cast('list[Any]', value)))}]"
    if isinstance(value, tuple):
        return f"({''.join(f'{_literal(item)}, ' for item in cast('tuple[Any, ...]', value))})"
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in items)}}}"
    return repr(value)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it renders its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox. Time and memory are limited by the process that renders."""

    code_generator_class = _CodeGenerator
    concat = staticmethod(provenance.concat)  # pyright: ignore[reportAssignmentType]
    from_template = staticmethod(provenance.from_template)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        untyped: Any = self
        untyped.filters.update(tojson=_tojson, join=_join)
        untyped.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)


@jinja2.pass_eval_context
def _join(eval_ctx: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    separator = d if isinstance(d, provenance.TemplateText) else provenance.TemplateText(str(d))
    return jinja2.filters.sync_do_join(eval_ctx, value, separator, attribute)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return dt.datetime.now().strftime(form)  # noqa: DTZ005 - models get the local date
