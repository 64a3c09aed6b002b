"""Log-probabilities in clients' shapes: names of tokens, numbers that JSON has, and numbers that must be equal."""

from __future__ import annotations

import math

from tests.server.stub import TOKENIZER
from trio_llm.messages import TokenLogprobs
from trio_llm.server.answers.completions import Position
from trio_llm.server.openai.logprobs import CompletionLogprobs, TokenNames, chat_logprobs, prompt_logprobs

NAMES = TokenNames(TOKENIZER)
A, B = TOKENIZER.encode("ab")
EURO = TOKENIZER.encode("€")


def test_the_chosen_token_has_one_number() -> None:
    """The chosen token's logprob among the likeliest is the very one of its column: harnesses compare them exactly."""
    entry = TokenLogprobs(A, -1.0, 1, ((A, -1.0000001), (B, -2.0)))
    columns = CompletionLogprobs(NAMES).take([(A, entry)])
    assert columns.top_logprobs == [{"a": columns.token_logprobs[0], "b": -2.0}]


def test_parts_of_characters_have_names_and_bytes() -> None:
    """A token that is a part of a character is named by its bytes, and they are given."""
    entry = TokenLogprobs(EURO[0], -1.0, 1, ())
    assert NAMES(EURO[0]) == "bytes:\\xe2"
    assert [token.bytes for token in chat_logprobs(NAMES, [entry]).content or ()] == [[0xE2]]
    assert NAMES(TOKENIZER.special_tokens["<|im_end|>"]) == "<|im_end|>"


def test_impossible_tokens_have_a_number() -> None:
    """JSON has no infinity: a token that cannot be has -9999 in every shape."""
    entry = TokenLogprobs(A, -math.inf, 9, ((B, -math.inf),))
    assert CompletionLogprobs(NAMES).take([(A, entry)]).top_logprobs == [{"b": -9999.0, "a": -9999.0}]
    assert [token.logprob for token in chat_logprobs(NAMES, [entry]).content or ()] == [-9999.0]
    shown = prompt_logprobs(NAMES, [None, entry])
    assert shown[0] is None
    assert shown[1] == {
        str(B): Position(logprob=-9999.0, rank=1, decoded_token="b"),
        str(A): Position(logprob=-9999.0, rank=9, decoded_token="a"),
    }


def test_offsets_run_on_over_chunks() -> None:
    """The text offsets of a streamed answer go on where the last chunk ended."""
    columns = CompletionLogprobs(NAMES)
    entry = TokenLogprobs(A, -1.0, 1, ())
    assert columns.take([(A, None), (B, entry)]).text_offset == [0, 1]
    assert columns.take([(A, entry)]).text_offset == [2]
