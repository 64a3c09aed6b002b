"""Reasoning and tool calls, told apart from text: the same pieces however the text is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_llm.server.parsing.json_object import ObjectReader
from trio_llm.server.parsing.message import MessageParser, MessageStyle
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Reasoning, merge
from trio_llm.server.parsing.reasoning import THINK, ReasoningParser, thinking_form
from trio_llm.server.parsing.response_values import calls_of
from trio_llm.server.parsing.tools import CALL_MARKERS, ToolForm, ToolParser, tool_form, tool_parser


def parse(parser, parts: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Feed parts and merge the pieces: (reasoning, content, calls as (name, arguments))."""
    pieces = [piece for part in parts for piece in parser.feed(part)] + parser.finish()
    calls: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            assert piece.index == len(calls)
            calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            calls[piece.index][1] += piece.text
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    return reasoning, content, [(name, arguments) for name, arguments in calls]


CALL = '{"name": "get_weather", "arguments": {"city": "Zü\\"r}ich", "days": [1, {"a": 2}]}}'
ARGUMENTS = '{"city": "Zü\\"r}ich", "days": [1, {"a": 2}]}'
LLAMA = CALL.replace("arguments", "parameters")

CASES = [
    ("hermes", "Hello there.", "Hello there.", []),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [("get_weather", ARGUMENTS)]),
    ("hermes", f"Sure.\n\n<tool_call>{CALL}</tool_call>", "Sure.", [("get_weather", ARGUMENTS)]),
    (
        "hermes",
        f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n" + '{"name": "b", "arguments": {}}\n</tool_call>',
        "",
        [("get_weather", ARGUMENTS), ("b", "{}")],
    ),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "late"}</tool_call>', "", [("late", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "none"}</tool_call>', "", [("none", "{}")]),
    ("hermes", "a <tool_cal is not one", "a <tool_cal is not one", []),
    ("hermes", "<tool_call>no json", "<tool_call>no json", []),
    ("hermes", '<tool_call>{"nom": 1}</tool_call>', '<tool_call>{"nom": 1}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "cut", "arguments": {"a": [1', "", [("cut", '{"a": [1')]),
    ("hermes", "ends in space \n\n", "ends in space \n\n", []),
    ("llama3", "Hello.", "Hello.", []),
    ("llama3", LLAMA, "", [("get_weather", ARGUMENTS)]),
    ("llama3", "<|python_tag|>" + LLAMA, "", [("get_weather", ARGUMENTS)]),
    ("llama3", f"{LLAMA}; {LLAMA}", "", [("get_weather", ARGUMENTS)] * 2),
    ("llama3", '{"type": "function", "name": "f", "parameters": {"k": true}}', "", [("f", '{"k": true}')]),
    ("llama3", '{"answer": 42, "name": "x"}', '{"answer": 42, "name": "x"}', []),
    ("llama3", "I think {1, 2} is a set.", "I think {1, 2} is a set.", []),
    ("mistral", "Hello.", "Hello.", []),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]", "", [("get_weather", ARGUMENTS)] * 2),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}", "", [("get_weather", ARGUMENTS)]),
    (
        "mistral",
        f"Ok.[TOOL_CALLS]get_weather{ARGUMENTS}[TOOL_CALLS]b[ARGS]" + "{}",
        "Ok.",
        [("get_weather", ARGUMENTS), ("b", "{}")],
    ),
    ("mistral", "[TOOL_CALLS] is how it is spelled, I believe.", "[TOOL_CALLS] is how it is spelled, I believe.", []),
    # Variations that small models write.
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", [("f", "{}")]),
    ("hermes", r'<tool_call>{"name": "f", "arguments": "{\"a\": \"}\"}"}</tool_call>', "", [("f", '{"a": "}"}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "no object"}</tool_call>', "", [("f", '"no object"')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1, 2]}</tool_call>', "", [("f", "[1, 2]")]),
    ("hermes", f"<tool_call>\n```json\n{CALL}\n```\n</tool_call> So.", " So.", [("get_weather", ARGUMENTS)]),
    ("hermes", f"<tool_call>```{CALL}```</tool_call>", "", [("get_weather", ARGUMENTS)]),
    ("hermes", f"<tool_call>{CALL}</tool_call>a <tool_call> b", "a <tool_call> b", [("get_weather", ARGUMENTS)]),
    ("hermes", f"<tool_call>\n[{CALL}, {CALL}]\n</tool_call> So.", " So.", [("get_weather", ARGUMENTS)] * 2),
    ("hermes", "<tool_call>[1, 2]</tool_call>", "<tool_call>[1, 2]</tool_call>", []),
    (
        "hermes",
        '<tool_call>{"name": "f",\n"arguments": {\n"a": "x\n\ty\\\\", "\\"": "\r"}}</tool_call>',
        "",
        [("f", '{\n"a": "x\\n\\ty\\\\", "\\"": "\\r"}')],
    ),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": "x\ny"}', "", [("f", '{"a": "x\\ny"}')]),
    ("hermes", "<tool_call>```json\nno object", "<tool_call>```json\nno object", []),
    ("hermes", f'<tool_call>{{"type": "function", "function": {CALL}}}</tool_call>', "", [("get_weather", ARGUMENTS)]),
    ("llama3", f'{{"type": "function", "function": {LLAMA}}}', "", [("get_weather", ARGUMENTS)]),
    ("llama3", '{"type": "function", "function": "f", "parameters": {"k": 1}}', "", [("f", '{"k": 1}')]),
    ("llama3", f"[{LLAMA}, {LLAMA}]", "", [("get_weather", ARGUMENTS)] * 2),
    ("llama3", f"<|python_tag|>[{LLAMA}]", "", [("get_weather", ARGUMENTS)]),
    ("llama3", '[{"answer": 42}, 1]', '[{"answer": 42}, 1]', []),
    ("llama3", " [1, 2] is a list.", " [1, 2] is a list.", []),
    ("llama3", "[", "[", []),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abc123def[ARGS]{ARGUMENTS}", "", [("get_weather", ARGUMENTS)]),
    ("mistral", "[TOOL_CALLS]a[CALL_ID]b c", "[TOOL_CALLS]a[CALL_ID]b c", []),
    ("mistral", "[TOOL_CALLS]" + "m" * 128 + "[ARGS]{}", "", [("m" * 128, "{}")]),
]

UNCLOSED = [
    (f"I call it.\n<tool_call>\n{CALL}\n</tool_call>", "I call it.\n", [("get_weather", ARGUMENTS)]),
    ("I might <tool_call> but never do", "I might <tool_call> but never do", []),
    (f"<tool_call>{CALL}</tool_call> or not</think>", f"<tool_call>{CALL}</tool_call> or not", []),
    (f"no <tool_call></think><tool_call>{CALL}", "no <tool_call>", [("get_weather", ARGUMENTS)]),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_every_form_is_read_whole_and_in_single_characters(form, text, content, calls) -> None:
    """Content and calls come out as written, whether the text comes at once or a character at a time."""
    assert parse(ToolParser(form), [text]) == ("", content, calls)
    assert parse(ToolParser(form), list(text)) == ("", content, calls)


@pytest.mark.parametrize(("text", "reasoning", "calls"), UNCLOSED)
def test_a_call_inside_thinking_counts_if_the_thinking_never_ends(text, reasoning, calls) -> None:
    """A call that a model writes without closing its thinking is one; a call that it only thinks of is not."""
    style = MessageStyle(thinks=True, thinking_begun=True, tool_form="hermes")
    for parts in ([text], list(text), [text[:12], text[12:]]):
        assert parse(MessageParser(style), parts) == (reasoning, "", calls)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_where_the_text_is_cut_does_not_matter(data: st.DataObject) -> None:
    """Any way of cutting the stream gives the same message: streamed equals non-streamed."""
    form, text, content, calls = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(ToolParser(form), parts) == ("", content, calls)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["hermes", "llama3", "mistral"]),
    st.lists(
        st.sampled_from(
            '<tool_call>#</tool_call>#```json#[TOOL_CALLS]#[CALL_ID]#[ARGS]#<|python_tag|>#{"name": "f"#}#{#'
            '"#"arguments": #"function": #null#, #text#\\#\n# # #[#]#é#<#;'.split("#")
        ),
        max_size=25,
    ),
)
def test_no_text_makes_a_parser_fail_or_disagree_with_itself(form, parts) -> None:
    """Hostile text parses to something, and to the same thing whole and in pieces."""
    assert parse(ToolParser(form), parts) == parse(ToolParser(form), ["".join(parts)])


@pytest.mark.parametrize("call", [r'{"name": "\ud800x", "arguments": {}}', r'{"name": "f", "arguments": "\ud800"}'])
def test_what_a_model_calls_can_be_written_as_utf_8(call: str) -> None:
    """It may spell half a character, which JSON can and UTF-8 cannot."""
    _, _, ((name, arguments),) = parse(tool_parser("hermes"), [f"<tool_call>{call}</tool_call>"])
    (called,) = calls_of(json.loads(call), {})
    for text in (name, arguments, *called):
        text.encode()


def test_arguments_stream_while_they_are_written() -> None:
    """A client sees the arguments grow; nothing waits for the end of the call."""
    parser = ToolParser("hermes")
    assert parser.feed('<tool_call>{"name": "f", "argum') == [CallStart(0, "f")]
    assert parser.feed('ents": {"a"') == [CallArguments(0, '{"a"')]
    assert parser.feed(": 1") == [CallArguments(0, ": 1")]


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>\nhmm\n</think>\n\nParis.", False, "hmm\n", "Paris."),
        ("hmm</think>Paris.", True, "hmm", "Paris."),
        ("Paris.", False, "", "Paris."),
        ("  \nParis.", False, "", "  \nParis."),
        ("<thin air>", False, "", "<thin air>"),
        ("<think>cut off", False, "cut off", ""),
        ("cut off </thi", True, "cut off </thi", ""),
        ("<think></think>\n\n", False, "", ""),
        ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
        ("let me see</think>\n\nfour", False, "", "let me see\n\nfour"),
        ("a</think>b</think>", False, "", "ab</think>"),
    ],
)
def test_reasoning_is_split_from_the_answer(text, inside, reasoning, content) -> None:
    """Thinking and answer come apart the same way whole and in single characters."""
    assert parse(ReasoningParser(inside=inside), [text])[:2] == (reasoning, content)
    assert parse(ReasoningParser(inside=inside), list(text))[:2] == (reasoning, content)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<|channel>thought\nhmm\n<channel|>Paris.", "hmm\n", "Paris."),
        ("<|channel>thought\n<channel|>Paris.", "", "Paris."),
        ("<|channel>a<channel|>b<|channel>thought\nc<channel|>d", "ac", "bd"),
        ("thought<channel|>Paris.", "", "Paris."),
        ("thoughtful", "", "thoughtful"),
        ("Paris.<channel|> Rome.", "", "Paris. Rome."),
        ("<|channel>thought", "", ""),
    ],
)
def test_channels_are_split_from_the_answer(text: str, reasoning: str, content: str) -> None:
    """Gemma 4's thoughts and their label come apart from the answer, whole and in single characters."""
    form = thinking_form("<channel|>")
    assert form is not None
    for parts in ([text], list(text)):
        pieces = parse(ReasoningParser(form), parts)
        assert pieces[:2] == (reasoning, content)


def test_thinking_is_known_from_template_and_tokens() -> None:
    """A template names how thinking ends; channels are known from their control tokens too, other markers are not."""
    assert thinking_form("...</think>...") == THINK
    assert thinking_form("", {"</think>", "[/THINK]"}) is None
    by_token, by_template = thinking_form("", {"<channel|>"}), thinking_form("<channel|>")
    assert by_token == by_template is not None


GEMMA_CALL = '<|tool_call>call:f{city:<|"|>Par{,}is "x"<|"|>,n:-1.5,ok:true,l:[1,<|"|>b<|"|>],o:{k:None}}<tool_call|>'


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        (
            "a " + GEMMA_CALL,
            "a ",
            '{"city": "Par{,}is \\"x\\"", "n": -1.5, "ok": true, "l": [1, "b"], "o": {"k": null}}',
        ),
        (GEMMA_CALL[:30], "", '{"city": "P'),
        (GEMMA_CALL[:60], "", '{"city": "Par{,}is \\"x\\"", "n": -1.5, "ok": "tru'),
        ("<|tool_call>call:f{}<tool_call|><|tool_response>", "", "{}"),
        (
            '<|tool_call>call:f{"a": "x, \\"y\\"}",\n"b" :"p\nq", c: "\\q", d: say "hi", e: "}<tool_call|>',
            "",
            '{"a": "x, \\"y\\"}", "b": "p\\nq", "c": "\\\\q", "d": "say \\"hi\\"", "e": "\\""}',
        ),
        ("<|tool_call>call:f{}<tool_call|>\n \nIt is: \n\n5 <", "\n \nIt is: \n\n5 <", "{}"),
        ("<|tool_call>call:f{}<tool_call|>\n \n", "", "{}"),
        ("<|tool_call>no call", "<|tool_call>no call", None),
        ("<|tool_call>{}", "<|tool_call>{}", None),
    ],
)
def test_gemma_calls_become_json(text: str, content: str, arguments: str | None) -> None:
    """Gemma 4's own way to write calls becomes JSON; where it is cut, the JSON is. Whole and in single characters."""
    for parts in ([text], list(text)):
        parser = tool_parser("gemma4")
        pieces = merge([piece for part in parts for piece in parser.feed(part)] + parser.finish())
        assert "".join(piece.text for piece in pieces if isinstance(piece, Content)) == content
        assert [piece.name for piece in pieces if isinstance(piece, CallStart)] == ["f"] * (arguments is not None)
        assert "".join(piece.text for piece in pieces if isinstance(piece, CallArguments)) == (arguments or "")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=4), _JSON, max_size=4), st.text(max_size=3), st.sampled_from([None, 1]))
def test_the_object_reader_agrees_with_json(value: dict[str, object], rest: str, indent: int | None) -> None:
    """Every JSON object is read to its end, value by value, and not a character further."""
    reader = ObjectReader()
    for character in json.dumps(value, indent=indent) + rest:
        reader.feed(character)
    assert reader.done and reader.rest == rest
    assert {key: json.loads(reader.raw(key)) for key in reader.keys} == value


def test_the_form_is_known_from_the_template() -> None:
    """Each family's template names its own markers; a template without tools has no form."""
    assert tool_form("{% if tools %}<tool_call>...") == "hermes"
    assert tool_form("...[TOOL_CALLS]...") == "mistral"
    assert tool_form("...<|python_tag|>...") == "llama3"
    assert tool_form("{{ messages }}") is None and tool_form(None) is None


@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral", "gemma4"])
def test_nothing_of_a_call_that_is_cut_before_its_name_is_content(form: ToolForm) -> None:
    """Wherever a limit ends the text of a call, its marker and what follows are not the answer's text."""
    texts = {
        "hermes": '<tool_call>\n{"name": "f", "arguments": {}}',
        "llama3": '<|python_tag|>{"name": "f", "parameters": {}}',
        "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {}}]',
        "gemma4": "<|tool_call>call:f{}",
    }
    text = texts[form]
    for end in range(len(CALL_MARKERS[form]), len(text) + 1):
        parser = tool_parser(form)
        pieces = parser.feed("Well. " * (form != "llama3") + text[:end]) + parser.finish()
        assert "".join(piece.text for piece in pieces if isinstance(piece, Content)).strip() in ("Well.", "")


@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral", "gemma4"])
@pytest.mark.parametrize("behind_marker", [False, True])
def test_white_space_is_copied_once(form: ToolForm, behind_marker: bool) -> None:
    """What may be a part of a call is kept in pieces, however long it is: joining at each would take quadratic time."""
    parser = MessageParser(MessageStyle(thinks=True, tool_form=form))
    pieces = parser.feed(CALL_MARKERS[form] * behind_marker)
    for _ in range(3000):
        pieces += parser.feed(" ")
        held = [*vars(parser._reasoning).values(), *vars(parser._tools).values()]
        assert all(len(text) < 1000 for text in held if isinstance(text, str))
    pieces = merge([*pieces, *parser.feed("?"), *parser.finish()])
    assert isinstance(pieces[-1], Content) and pieces[-1].text.endswith(" " * 3000 + "?")


def test_parsing_takes_time_in_proportion_to_the_text() -> None:
    """Twice the hostile text costs about twice the work, not four times: counted in steps, not seconds."""

    def steps(size: int) -> int:
        parser, count = ToolParser("hermes"), 0
        real = ObjectReader._step

        def counted(self: ObjectReader, character: str) -> None:
            nonlocal count
            count += 1
            real(self, character)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ObjectReader, "_step", counted)
            for part in ["<tool_call>{", '"a": "' + "<tool_call>{" * size]:
                parser.feed(part)
        return count

    assert steps(2000) < 2.1 * steps(1000)
