"""The grammar of a whole answer: optional thinking, then one of the requested forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from trio_llm import grammar
from trio_llm.grammar import GrammarSource
from trio_llm.server.constraints.markers import Markers
from trio_llm.server.parsing.reasoning import THINK, ThinkingForm

Thinking = Literal["none", "possible", "begun"]
"""Whether a model thinks before it answers: never, optionally, or because its prompt ends inside thinking."""


def answer_grammar(
    forms: Sequence[GrammarSource],
    thinking: Thinking,
    added_tokens: Mapping[str, int],
    form: ThinkingForm = THINK,
) -> GrammarSource | None:
    """Return the grammar of an answer with one of several forms; None for free text.

    Thinking is free: the form begins after its end.
    """
    if not forms:
        return None
    if len(forms) == 1 and thinking == "none":
        return forms[0]
    markers = Markers(added_tokens)
    answer = " | ".join(f"@{grammar.form_name(index)}" for index in range(len(forms)))
    rules = ["%llguidance {}", f"answer: {answer}"]
    if thinking == "none":
        return grammar.compose([*rules, "start: answer"], forms)
    thought = "opening GAP" if thinking == "begun" else f"({markers(form.open)} opening GAP)?"
    # Line breaks between the two belong to neither. They are bounded, or a model could write them forever.
    rules += [f"start: {thought} answer", *markers.after("TEXT", form.close), r"TEXT: /(.|\n)*/", r"GAP: /\n{0,2}/"]
    return grammar.compose(rules, forms)
