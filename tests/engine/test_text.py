from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from trio_llm.engine.text import OutputText
from trio_llm.params import RepetitionDetection

# Byte-level tokens: pieces of a text that may end in the middle of a character.
texts = st.text(alphabet="abé€🎈", min_size=1, max_size=30)


def pieces(text: str, cuts: list[int]) -> list[bytes]:
    """Cut a text's bytes anywhere."""
    data = text.encode()
    at = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[first:end] for first, end in pairwise(at)]


def shown(
    tokens: list[bytes], groups: list[int], stop: Sequence[str], min_tokens: int = 0
) -> tuple[str, int, str | None]:
    """Feed tokens in groups; return the text shown, the tokens taken and the stop string found."""
    output = OutputText(
        lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"), (), stop, min_tokens=min_tokens
    )
    text, taken, sizes = "", 0, iter(groups)
    while taken < len(tokens) and output.matched is None:
        size = next(sizes, 1)
        more, took = output.add(range(taken, min(taken + size, len(tokens))))
        text, taken = text + more, taken + took
    if output.matched is None:
        text += output.end()
    assert output.num_tokens == taken
    return text, taken, output.matched


@given(texts, st.lists(st.integers(0, 200)), st.lists(st.integers(1, 5)))
def test_pieces_concatenate_to_the_text(text: str, cuts: list[int], groups: list[int]) -> None:
    """However bytes are cut into tokens and tokens into deltas, the deltas are the text, with no half character."""
    tokens = pieces(text, cuts)
    assert shown(tokens, groups, ()) == (text, len(tokens), None)


@given(texts, st.lists(st.integers(0, 200)), st.lists(st.integers(1, 5)), st.data())
def test_a_stop_string_never_shows(text: str, cuts: list[int], groups: list[int], data: st.DataObject) -> None:
    """For every cut the text ends before the first stop string, and grouping changes nothing."""
    first = data.draw(st.integers(0, len(text) - 1))
    stop = text[first : data.draw(st.integers(first + 1, len(text)))]
    tokens = pieces(text, cuts)
    alone = shown(tokens, [], (stop,))
    assert alone == shown(tokens, groups, (stop,))
    assert alone[::2] == (text[: text.index(stop)], stop)


def test_text_of_the_first_tokens_is_no_stop_string() -> None:
    """A stop string is looked for only in what follows the first min_tokens tokens."""
    tokens = [b"a", b"b", b"a", b"b", b"c"]
    assert shown(tokens, [], ("ab",), min_tokens=2) == ("ab", 4, "ab")
    assert shown(tokens, [5], ("ab",), min_tokens=2) == ("ab", 4, "ab")
    assert shown([b"x", b"ab", b"ab"], [], ("ab",), min_tokens=2) == ("xab", 3, "ab")


def test_a_stop_string_may_begin_in_the_first_tokens() -> None:
    """What counts is where a stop string is complete: text of the first min_tokens tokens can begin it, as in vLLM."""
    assert shown([b"x", b"a", b"b"], [], ("ab",), min_tokens=2) == ("x", 3, "ab")
    assert shown([b"x", b"a", b"b"], [3], ("ab",), min_tokens=2) == ("x", 3, "ab")
    assert shown([b"a", b"a", b"a"], [], ("aa",), min_tokens=2) == ("a", 3, "aa")


def test_output_in_circles_ends() -> None:
    """Tokens after the last repetition are not taken, whatever the groups; before min_tokens repetitions are let be."""
    wanted = RepetitionDetection(max_pattern_size=2, min_count=2)
    for group in (1, 9):
        for min_tokens, expected in ((0, 4), (5, 7)):
            output = OutputText(
                lambda ids: "".join("abc"[i] for i in ids), (), repetition=wanted, min_tokens=min_tokens
            )
            tokens, taken = [0, 1, 0, 1, 2, 0, 0, 1], 0
            while not output.repeats:
                taken += output.add(tokens[taken : taken + group])[1]
            assert taken == output.num_tokens == expected
