"""Streamed text equals decoded text, for both kinds of decoders and every cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trio_llm.core.detokenizer import Detokenizer

SPECIAL = 256


def byte_level(ids: Sequence[int]) -> str:
    """Decode like byte-level BPE with one token per byte; 256 is a special token without text."""
    return bytes(token for token in ids if token != SPECIAL).decode("utf-8", "replace")


WORDS = ["▁Hello", "▁world", "▁", "lo", "▁▁x", "é", "你"]


def byte_fallback(ids: Sequence[int]) -> str:
    """Decode like SentencePiece: words with ▁ for a space, runs of bytes from 100 on, a leading space dropped."""
    text, run = "", b""
    for token in [*ids, None]:
        if token is not None and token >= 100:
            run += bytes([token - 100])
            continue
        if run:
            try:
                text += run.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
            run = b""
        if token is not None and token < len(WORDS):
            text += WORDS[token].replace("▁", " ")
    return text.removeprefix(" ")


texts = st.text(st.sampled_from("a é你😀\u200d👩\ufffd"), max_size=12)
dirt = st.lists(st.sampled_from([0x80, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0xFF, 0x61, SPECIAL]), max_size=24)


def stream(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    """Return what each token, and then the end, makes visible."""
    return [*(detokenizer.add((token,)) for token in ids), detokenizer.finish()]


@given(st.lists(texts.map(lambda text: list(text.encode())) | dirt, max_size=4))
@example([[0xE4, 0xBD], [0xA0]])
@example([[0x80] * 30])
def test_bytes_come_out_as_they_decode_at_once(parts: list[list[int]]) -> None:
    """Valid or not, the pieces add up to what the whole output decodes to, special tokens within included."""
    ids = [token for part in parts for token in part]
    assert "".join(stream(Detokenizer(byte_level), ids)) == byte_level(ids)


@given(st.lists(texts.map(lambda text: list(text.encode())) | dirt, max_size=4), st.integers(1, 5))
def test_the_text_does_not_depend_on_the_calls(parts: list[list[int]], size: int) -> None:
    """One token at a time or many in one call: the same text."""
    ids = [token for part in parts for token in part]
    detokenizer = Detokenizer(byte_level)
    chunks = [detokenizer.add(ids[at : at + size]) for at in range(0, len(ids), size)]
    assert "".join(chunks) + detokenizer.finish() == "".join(stream(Detokenizer(byte_level), ids))


@given(texts.filter(lambda text: "\ufffd" not in text))
def test_no_piece_of_valid_text_is_half_a_character(text: str) -> None:
    """As long as the bytes are valid no replacement character is ever shown."""
    shown = stream(Detokenizer(byte_level), list(text.encode()))
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(shown) == text


@given(st.lists(st.integers(0, len(WORDS) - 1) | st.sampled_from([*range(327, 331), 99]), max_size=12), st.data())
def test_words_keep_their_spaces_behind_a_prompt(ids: list[int], data: st.DataObject) -> None:
    """A decoder that drops a leading space drops none of the output's, however the prompt is cut off."""
    ids = [token for token in ids if token < 100]
    prompt = data.draw(st.lists(st.integers(0, len(WORDS) - 1), max_size=12))
    shown = "".join(stream(Detokenizer(byte_fallback, [0, *prompt]), ids))
    assert shown == byte_fallback([0, *prompt, *ids])[len(byte_fallback([0, *prompt])) :]


@given(st.lists(texts.filter(lambda text: "\ufffd" not in text), max_size=4))
def test_byte_fallback_characters_come_whole(parts: list[str]) -> None:
    """Runs of single-byte tokens, which decode all or nothing, stream as whole characters."""
    ids = [0]
    for part in parts:
        ids += [100 + byte for byte in part.encode()] + [1]
    shown = stream(Detokenizer(byte_fallback), ids)
    assert "".join(shown) == byte_fallback(ids)
    assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("decode", [byte_level, byte_fallback])
def test_a_character_that_the_prompt_began_is_output_whole(decode) -> None:
    """Half a character in the prompt belongs to the output that completes it, and is the prompt's if nothing does."""
    shift = 100 if decode is byte_fallback else 0
    half, rest = [shift + 0xE4, shift + 0xBD], [shift + 0xA0]
    plain = [0] if decode is byte_fallback else [0x61]
    assert "".join(stream(Detokenizer(decode, half), rest)) == "你"
    assert "".join(stream(Detokenizer(decode, half), plain)) == decode([*half, *plain]).lstrip("\ufffd")
    assert "".join(stream(Detokenizer(decode, half), [])) == ""


def test_a_replacement_character_in_the_prompt_stays_there() -> None:
    """A prompt that really ends with U+FFFD puts none into the output."""
    prompt = list("x\ufffd".encode())
    assert "".join(stream(Detokenizer(byte_level, prompt), list(b"abc"))) == "abc"


@pytest.mark.parametrize("token", [0x80, 0xF0, SPECIAL, 0x61])
def test_every_token_costs_the_same(token: int) -> None:
    """Neither invalid bytes nor tokens without text make the window, and so the work, grow with the output."""
    decoded: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return byte_level(ids)

    detokenizer = Detokenizer(decode)
    for _ in range(500):
        detokenizer.add((token,))
    assert max(decoded) <= 32
    assert sum(decoded) < 500 * 64
