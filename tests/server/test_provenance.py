"""Random Jinja programs over users' text: they do what Jinja does, and only the template's letters count as its own."""

from __future__ import annotations

from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_llm.server.templates import provenance
from trio_llm.server.templates.environment import Environment

# Templates are written in letters up to "m", users write the others: where a letter comes from can be seen.
WORDS = st.text("abcm <|>", max_size=5)
USERS = st.text("nxyz <|>", max_size=5)
LITERAL = WORDS.map(repr)
ATOM = st.one_of(LITERAL, st.sampled_from(["u", "v", "d.k", "d['n']", "token", "(d|list)[0]", "missing"]))
NUMBER = st.sampled_from(["-2", "-1", "0", "1", "2", "7"])
UNARY = [
    "{a}|trim",
    "{a}|upper",
    "{a}|lower",
    "{a}|title",
    "{a}|capitalize",
    "{a}|tojson",
    "{a}|string",
    "{a}|length",
    "{a}|list|join",
    "{a}|reverse|join",
    "{a}|first",
    "{a}|last",
    "{a}|indent",
    "{a}|e",
    "{a}|center(9)",
    "{a}|replace('<', '|')",
    "{a}|reverse|list|join('-')",
    "{a}|wordcount",
    "{a}|default('c')",
    "{a}|batch(2)|first|join",
    "{a}.title()",
    "{a}.split()|join('/')",
    "{a}.rsplit(none, 1)|join('/')",
    "{a}.splitlines()|join('/')",
    "{a}.lstrip('<')",
    "{a}.rstrip('|>')",
    "{a}.strip()",
    "{a}.swapcase()",
    "{a}.zfill(8)",
    "{a}.ljust(8, 'c')",
    "{a}.expandtabs()",
    "{a}[::-1]",
    "{a}.isalpha()",
    "{a} is string",
    "{a} is none",
    "{{'c': {a}}}|tojson",
    "{{{a}: 'c'}}|tojson",
    "({a}, 'c')|join",
    "[{a}]|map('upper')|join",
    "{a}|string|trim('<')",
]
BINARY = [
    "{a} + {b}",
    "{a} ~ {b}",
    "{a}.split({b})|join({b})",
    "[{a}, {b}]|join('|')",
    "{b}.join([{a}, 'c', {a}])",
    "{a} == {b}",
    "{a} in {b}",
    "{a}.partition({b})|join('m')",
    "{a}.rpartition({b})[0]",
    "{a}.removeprefix({b})",
    "{a}.removesuffix({b})",
    "{a}.replace({b}, 'c')",
    "{a}.replace('c', {b}, 1)",
    "{a}|replace({b}, 'c')",
    "{a}.strip({b})",
    "{a}.rsplit({b}, 1)|join('c')",
    "'%s<%s' % ({a}, {b})",
    "'{{}}<{{}}'.format({a}, {b})",
    "'%s<'|format({a})",
    "{a} if {b} else 'c'",
    "{a} or {b}",
    "{a}.endswith({b})",
    "{a}.find({b})",
    "{a} < {b}",
    "({a} ~ {b})|trim",
    "{{{a}: 'c'}}.get({b}, 'c')",
    "{a}.count({b})",
    "{a}|default({b}, true)",
    "{a}.center(9, {b})",
]
NUMERIC = [
    "{a} * {n}",
    "{n} * {a}",
    "{a}[{n}:]",
    "{a}[:{n}]",
    "{a}[{n}]",
    "{a}.split('<', {n})|join('c')",
    "{a}|truncate({n}, true)",
]


def _bigger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    a, b = (inner.map("({})".format) for _ in range(2))
    return st.one_of(
        st.builds(lambda form, a: form.format(a=a), st.sampled_from(UNARY), a),
        st.builds(lambda form, a, b: form.format(a=a, b=b), st.sampled_from(BINARY), a, b),
        st.builds(lambda form, a, n: form.format(a=a, n=n), st.sampled_from(NUMERIC), a, NUMBER),
    )


EXPRESSION = st.recursive(ATOM, _bigger, max_leaves=6)
STATEMENTS = [
    "{{{{ {e} }}}}",
    "ab{{{{ {e} }}}}<|m|>",
    "{{% set x %}}c{{{{ {e} }}}}{{% endset %}}{{{{ x }}}}",
    "{{% set x = {e} %}}{{{{ x ~ u }}}}",
    "{{% macro f(x) %}}<{{{{ x }}}}|{{% endmacro %}}{{{{ f({e})|trim }}}}",
    "{{% for c in {e} %}}{{{{ c }}}}m{{% endfor %}}",
    "{{% set ns = namespace(t='') %}}{{% for i in range(3) %}}{{% set ns.t = ns.t + ({e})|string %}}{{% endfor %}}"
    "{{{{ ns.t }}}}",
    "{{% filter upper %}}a{{{{ {e} }}}}{{% endfilter %}}",
    "{{% macro f() %}}{{{{ caller({e}) }}}}{{% endmacro %}}{{% call(x) f() %}}{{{{ x }}}}{{% endcall %}}",
    "{{% if {e} %}}a{{% else %}}{{{{ u }}}}{{% endif %}}",
    "{{% generation %}}{{{{ {e} }}}}{{% endgeneration %}}",
]
PROGRAM = st.lists(
    st.builds(lambda form, e: form.format(e=e), st.sampled_from(STATEMENTS), EXPRESSION), max_size=3
).map("".join)


def _plain_jinja() -> jinja2.Environment:
    ours: Any = Environment()
    plain: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[type(e) for e in ours.extensions.values()]
    )
    plain.filters["tojson"] = ours.filters["tojson"]
    return plain


OURS, PLAIN = Environment(), _plain_jinja()


def _outcome(render: Any) -> str:
    try:
        return provenance.concat(render())
    except Exception as error:  # noqa: BLE001 - whatever it is, the other must raise it as well
        return type(error).__name__


@given(PROGRAM, USERS, USERS)
def test_programs_do_what_jinja_does_and_trust_no_user(program: str, first: str, second: str) -> None:
    """Any program renders the text that plain Jinja renders, and no letter of a user is ever the template's."""
    variables = {"u": first, "v": second, "d": {first or "n": second, "k": second, "n": first}, "token": "<m>"}
    expected = _outcome(lambda: PLAIN.from_string(program).generate(variables))
    told = {**variables, "token": provenance.from_template("<m>")}
    got = _outcome(lambda: OURS.from_string(program).generate(told))
    assert str.__eq__(got, expected)
    trusted = "".join(text for text, trusted in provenance.segments(got) if trusted)
    assert not set(trusted.lower()) & set("nxyz")


@pytest.mark.parametrize(
    ("program", "segments"),
    [
        ("<m>{{ u }}<c>", [("<m>", True), ("nx", False), ("<c>", True)]),
        ("{{ '<m>' + u + '<c>' }}", [("<m>", True), ("nx", False), ("<c>", True)]),
        ("{{ u + ('<m>' | trim) }}", [("nx", False), ("<m>", True)]),
        ("{{ token ~ u ~ 1 }}", [("<m>", True), ("nx1", False)]),
        ("{% macro f(x) %}<a>{{ x }}<b>{% endmacro %}{{ f(u) | trim }}", [("<a>", True), ("nx", False), ("<b>", True)]),
        ("{% set x %}<a>{{ u }}{% endset %}{{ x }}", [("<a>", True), ("nx", False)]),
        ("{{ '<a>,<b>'.split(',') | join(u) }}", [("<a>", True), ("nx", False), ("<b>", True)]),
        ("{{ {'n': '<a>'}['n'] * 2 }}", [("<a><a>", True)]),
        ("{{ '<a>c'.replace('c', u) }}", [("<a>", True), ("nx", False)]),
        ("{{ ['<a>', u] | tojson }}", [('["<a>", "nx"]', False)]),
        ("{{ '<A>' | lower }}", [("<a>", True)]),
    ],
)
def test_what_templates_write_is_theirs(program: str, segments: list[tuple[str, bool]]) -> None:
    """Through the operations that templates build prompts with, their control tokens stay theirs."""
    variables = {"u": "nx", "token": provenance.from_template("<m>")}
    assert provenance.segments(_outcome(lambda: OURS.from_string(program).generate(variables))) == segments
