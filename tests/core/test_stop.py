"""Stop strings against a definition that looks at the whole text at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trio_llm.core.stop import StopStrings

letters = st.text("ab", max_size=14)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def whole(text: str, stop: list[str], *, include: bool) -> tuple[str, str | None]:
    """Return what may be shown of a text, by the definition: the match that ends first, of those the longest."""
    matches = [(text.find(one) + len(one), -len(one), one) for one in stop if one in text]
    if not matches:
        return text, None
    end, _, matched = min(matches)
    return text[: end if include else end - len(matched)], matched


def pieces(stopper: StopStrings, parts: list[str]) -> tuple[str, str | None]:
    """Return what is shown of a text that comes in parts, and what ended it."""
    shown = ""
    for part in parts:
        emitted, matched = stopper.add(part)
        shown += emitted
        if matched is not None:
            return shown, matched
    return shown + stopper.finish(), None


@given(letters, stops, st.booleans(), st.data())
def test_every_cut_gives_the_same_text(text: str, stop: list[str], include: bool, data: st.DataObject) -> None:
    """However the text is cut into pieces, what is shown and what matched is what the whole text says."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert pieces(StopStrings(stop, include=include), parts) == whole(text, stop, include=include)


@given(letters, stops)
def test_no_more_is_held_back_than_may_still_match(text: str, stop: list[str]) -> None:
    """What is held is the longest end of the text that a stop string begins with, and not a character more."""
    stopper = StopStrings(stop)
    shown, matched = stopper.add(text)
    if matched is None:
        held = [size for one in stop for size in range(len(one)) if text.endswith(one[:size])]
        assert len(text) - len(shown) == max(held, default=0)
        assert shown + stopper.finish() == text
        assert stopper.finish() == ""


def test_a_stop_string_across_many_pieces_is_found() -> None:
    """Character by character, nothing of it is ever shown, and what looked like it is given back when it is not."""
    stopper = StopStrings(["\n\nUser:"])
    assert [stopper.add(character)[0] for character in "Hi\n\nUse it"] == [*"Hi", "", "", "", "", "", "\n\nUse ", *"it"]
    assert [stopper.add(character) for character in "\n\nUser"] == [("", None)] * 6
    assert stopper.add(":!") == ("", "\n\nUser:")


def test_a_false_start_hides_no_real_one() -> None:
    """A string that overlaps itself is found where a naive restart would miss it."""
    assert StopStrings(["aab"]).add("xaaab") == ("xa", "aab")
    assert StopStrings(["aab"]).add("xaaaab") == ("xaa", "aab")
    assert StopStrings(["abab"], include=True).add("aababb") == ("aabab", "abab")
    assert StopStrings(["b", "ab"]).add("ab") == ("", "ab")


def test_without_stop_strings_text_passes_through() -> None:
    """Nothing is held back for nothing."""
    stopper = StopStrings([])
    assert stopper.add("text") == ("text", None)
    assert stopper.finish() == ""
