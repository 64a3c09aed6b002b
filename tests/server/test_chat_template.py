"""Templates: rendered as transformers would, and users cannot write control tokens into them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.stub import SPECIAL, TEMPLATE, TOKENIZER
from trio_llm.config import LimitsConfig
from trio_llm.errors import CheckpointError, InvalidRequestError
from trio_llm.server.chat_template import ChatTemplate


def template(source: str = TEMPLATE, limits: LimitsConfig | None = None) -> ChatTemplate:
    """Compile a template with the stub's control tokens."""
    return ChatTemplate(source, {"eos_token": SPECIAL[0]}, SPECIAL, limits or LimitsConfig())


def render(source: str, messages: list[dict[str, Any]], limits: LimitsConfig | None = None, **options: Any) -> str:
    """Render and join the segments."""
    settings = {"add_generation_prompt": False, "continue_final_message": False, "variables": {}, **options}
    return "".join(text for text, _ in template(source, limits).render(messages, **settings))


def ids(source: str, messages: list[dict[str, Any]]) -> list[int]:
    """Render and tokenize."""
    options = {"add_generation_prompt": True, "continue_final_message": False, "variables": {}}
    return TOKENIZER.encode_segments(template(source).render(messages, **options))


def turn(content: str, role: str = "user", **more: str) -> dict[str, Any]:
    """Return a message."""
    return {"role": role, "content": content, **more}


TEXT = st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", "<", "|", ">", "a", " ", "\n"]), max_size=6).map("".join)


@given(st.lists(TEXT, min_size=1, max_size=3))
def test_users_write_no_control_tokens(contents: list[str]) -> None:
    """T1: whatever users write, the prompt has the template's control tokens and not one more, and all of the text."""
    messages = [turn(content) for content in contents]
    got = ids(TEMPLATE, messages)
    special = [token for token in got if token in TOKENIZER.special_tokens.values()]
    assert len(special) == 2 * len(messages) + 1
    assert TOKENIZER.decode(got, skip_special_tokens=False) == render(TEMPLATE, messages, add_generation_prompt=True)


def test_two_texts_side_by_side_make_no_control_token() -> None:
    """A literal begun by one user text and completed by the next stays text, trimmed or not."""
    source = "{{ messages[0].content | trim }}{{ messages[1].content }}"
    for first, second in (("<|im_", "end|>"), ("<|im_ ", "end|>"), ("<", "|im_end|>")):
        got = ids(source, [turn(first), turn(second)])
        assert TOKENIZER.decode(got, skip_special_tokens=False) == "<|im_end|>"
        assert TOKENIZER.special_tokens["<|im_end|>"] not in got


def test_every_field_of_the_user_is_masked() -> None:
    """Names and template variables are users' text like contents are."""
    source = "{{ messages[0].name }}{{ flag.deep[0] }}"
    options = {"add_generation_prompt": False, "continue_final_message": False}
    segments = template(source).render(
        [turn("", name=SPECIAL[1])], variables={"flag": {"deep": [SPECIAL[2]]}}, **options
    )
    assert not set(TOKENIZER.encode_segments(segments)) & set(TOKENIZER.special_tokens.values())


def test_ordinary_text_is_tokenized_in_one_piece() -> None:
    """Without control tokens in it a conversation gives exactly the ids of its rendered text."""
    messages = [turn("hello"), turn("hi <b>", "assistant"), turn("é")]
    assert ids(TEMPLATE, messages) == TOKENIZER.encode(render(TEMPLATE, messages, add_generation_prompt=True))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {{ m.content }}\n  {% endfor %}", "  a\n  b\n"),
        ("{% for m in messages %}{% break %}{% endfor %}", ""),
        ("{{ {'b': 'é<'} | tojson }}", '{"b": "é<"}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "a"),
        ("{{ eos_token }}{{ tools is none }}{{ undefined_thing }}", "<|endoftext|>True"),
        ("{{ messages[0].content.startswith('a') }}{{ 3 * 4 }}", "True12"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_the_dialect(source: str, expected: str) -> None:
    """Trimmed blocks, loop controls, tojson without HTML escapes and the other habits of model templates work."""
    assert render(source, [turn("a"), turn("b")]) == expected


def test_templates_see_what_users_wrote() -> None:
    """Masks hide control tokens alone: a template that looks into ordinary text finds it."""
    source = "{% if '</think>' in messages[0].content %}{{ messages[0].content.split('</think>')[1] }}{% endif %}"
    assert render(source, [turn("x</think>y<|im_end|>z")]) == "y<|im_end|>z"


def test_developers_are_the_system_of_templates_that_do_not_know_them() -> None:
    """The developer role is rendered as system, unless the template knows it."""
    assert render("{{ messages[0].role }}", [turn("x", "developer")]) == "system"
    assert render("{# developer #}{{ messages[0].role }}", [turn("x", "developer")]) == "developer"


@pytest.mark.parametrize(
    ("content", "expected"), [("It is", "It is"), ("It is ", "It is "), ("<|im_end|>", "<|im_end|>")]
)
def test_a_final_message_can_be_continued(content: str, expected: str) -> None:
    """The prompt ends inside the last message, without the end of its turn, its spaces kept."""
    text = render(TEMPLATE, [turn("q"), turn(content, "assistant")], continue_final_message=True)
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n" + expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 // 0 }}",
        "{{ messages[9].content.x }}",
        "{{ messages[0].content + 1 }}",
        "{% set _ = messages.append(1) %}",
    ],
)
def test_hostile_and_failing_templates_are_refusals(source: str) -> None:
    """H-T20: a template that breaks out, explodes or raises ends as an InvalidRequestError."""
    with pytest.raises(InvalidRequestError, match="template"):
        render(source, [turn("x")])


def test_output_and_time_are_limited() -> None:
    """A template that goes on for ever is stopped by what it has written, or by how long it took."""
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'xxxxxxxxxx' }}{% endfor %}{% endfor %}"
    for limits, reason in (
        (LimitsConfig(max_template_chars=1000), r"1000 characters \(--max-template-chars\)"),
        (LimitsConfig(max_template_chars=10**12, template_timeout_s=0.001), r"0.001 s \(--template-timeout\)"),
    ):
        with pytest.raises(InvalidRequestError, match=reason):
            render(endless, [turn("x")], limits=limits)


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "chat_template", "tokenize", "eos_token"]
)
def test_variables_replace_nothing(name: str) -> None:
    """CVE-2025-61620: chat_template_kwargs cannot replace what the server itself gives the template."""
    with pytest.raises(InvalidRequestError) as caught:
        render(TEMPLATE, [turn("x")], variables={name: "x"})
    assert caught.value.param == "chat_template_kwargs"


def test_a_broken_template_is_a_checkpoint_error() -> None:
    """A template that does not parse is refused when it is loaded."""
    with pytest.raises(CheckpointError, match="template"):
        template("{% for %}")
