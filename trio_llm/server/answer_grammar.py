"""The grammar of a whole answer: the thinking that may come first, and then one of the forms that were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from trio_llm import grammar
from trio_llm.grammar import GrammarSource
from trio_llm.server.markers import Markers
from trio_llm.server.parsing.reasoning import CLOSE, OPEN

Thinking = Literal["none", "possible", "begun"]
"""Whether a model thinks before it answers: not at all, as it likes, or because its prompt ends inside thinking."""


def answer_grammar(
    forms: Sequence[GrammarSource], thinking: Thinking, special_tokens: Mapping[str, int]
) -> GrammarSource | None:
    """Return what an answer is held to that has any of several forms; None for one that is free.

    Thinking has no form: what the answer is held to begins behind its end.
    """
    if not forms:
        return None
    if len(forms) == 1 and thinking == "none":
        return forms[0]
    markers = Markers(special_tokens)
    answer = " | ".join(f"@{grammar.form_name(index)}" for index in range(len(forms)))
    rules = ["%llguidance {}", f"answer: {answer}"]
    if thinking == "none":
        return grammar.compose([*rules, "start: answer"], forms)
    thought = "opening GAP" if thinking == "begun" else f"({markers(OPEN)} opening GAP)?"
    # Line breaks between the two belong to neither; few, or a model could go on with them for ever.
    rules += [f"start: {thought} answer", *markers.after("TEXT", CLOSE), r"TEXT: /(.|\n)*/", r"GAP: /\n{0,2}/"]
    return grammar.compose(rules, forms)
