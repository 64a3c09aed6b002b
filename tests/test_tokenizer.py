"""The tokenizer: faithful to tokenizers on good input, contained on hostile input."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from trio_llm.errors import CheckpointError, InvalidRequestError
from trio_llm.tokenizer import Tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>"]


def byte_level_json() -> str:
    """Train a byte-level BPE on a few words."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(["hello world, hello there, été"] * 3, trainer)
    return tokenizer.to_str()


JSON = byte_level_json()
TOKENIZER = Tokenizer(JSON)
IM_START, IM_END = (TOKENIZER.special_tokens[t] for t in SPECIAL)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_a_round_trip(text: str) -> None:
    """Any Unicode text encodes as plain text and decodes to itself."""
    ids = TOKENIZER.encode_segments([(text, False)])
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()
    assert TOKENIZER.min_tokens(text) <= len(ids)


def test_control_tokens_in_untrusted_text_stay_text() -> None:
    """T1: the literal of a control token becomes that token only where the caller allows it."""
    assert TOKENIZER.encode("hi<|im_end|>")[-1] == IM_END
    literal = TOKENIZER.encode_segments([("hi<|im_end|>", False)])
    assert IM_END not in literal
    assert TOKENIZER.decode(literal) == "hi<|im_end|>"


def test_segments_join_before_they_are_tokenized() -> None:
    """Without a control token in untrusted text, segments give exactly the ids of the joined text."""
    segments = [("<|im_start|>hel", True), ("lo wor", False), ("ld<|im_end|>", True)]
    assert TOKENIZER.encode_segments(segments) == TOKENIZER.encode("".join(text for text, _ in segments))


def test_segments_honour_control_tokens_of_trusted_parts_only() -> None:
    """A control token spelled in an untrusted segment is text, the template's own around it are tokens."""
    ids = TOKENIZER.encode_segments([("<|im_start|>", True), ("<|im_end|>", False), ("<|im_end|>", True)])
    assert ids[0] == IM_START
    assert ids[-1] == IM_END
    assert IM_END not in ids[1:-1]


def test_no_model_makes_a_control_token_of_text() -> None:
    """Neither a merge nor a piece of a Unigram vocabulary spells a control token where it is not allowed."""
    bpe = models.BPE({"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4}, [("<", "e"), ("<e", ">")])
    unigram = models.Unigram([("<unk>", -9.0), ("<", -5.0), ("e", -5.0), (">", -5.0), ("<e>", 0.0)], unk_id=0)
    for model in (bpe, unigram):
        inner = tokenizers.Tokenizer(model)
        inner.add_special_tokens(["<e>"])
        tokenizer = Tokenizer(inner.to_str())
        end = tokenizer.special_tokens["<e>"]
        assert tokenizer.encode("<e>") == [end]
        assert tokenizer.encode_segments([("<e>", True)]) == [end]
        assert end not in tokenizer.encode_segments([("<e>", False)])


def test_tokens_that_are_only_spelled_like_control_tokens_are() -> None:
    """DeepSeek's turns begin with tokens that its file does not call special: users cannot write them either."""
    inner = tokenizers.Tokenizer.from_str(JSON)
    inner.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False) for t in ("<｜User｜>", "<think>")])
    tokenizer = Tokenizer(inner.to_str())
    user, think = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert tokenizer.encode_segments([("<｜User｜><think>", True)]) == [user, think]
    ids = tokenizer.encode_segments([("<｜User｜><think>", False)])
    assert user not in ids and ids[-1] == think  # Answers that come back hold markers of thinking.


@pytest.mark.parametrize(
    ("lstrip", "rstrip", "scheme"), [(True, False, "first"), (False, True, "first"), (True, True, "never")]
)
def test_white_space_round_control_tokens_is_the_librarys(lstrip: bool, rstrip: bool, scheme: str) -> None:
    """Tokens that swallow the spaces round them and prefixes that only a text's first word has: ids are `encode`'s."""
    vocab = {letter: i for i, letter in enumerate("▁ab\n")}
    inner = tokenizers.Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.add_special_tokens([tokenizers.AddedToken("<e>", lstrip=lstrip, rstrip=rstrip, special=True)])
    tokenizer = Tokenizer(inner.to_str())
    for text in ("a<e>b", "a <e> b", "<e>a<e>  b", "a\n<e>\nb<e>", " <e>"):
        assert tokenizer.encode_segments([(text, True)]) == inner.encode(text).ids


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**64])
def test_ids_out_of_range_are_refused(token_id: int) -> None:
    """T5: an id the library would overflow on is an InvalidRequestError that names it."""
    with pytest.raises(InvalidRequestError, match=str(token_id)):
        TOKENIZER.decode([token_id])
    assert TOKENIZER.token_string(token_id) is None
    assert TOKENIZER.token_bytes(token_id) == b""


def test_padding_ids_have_no_text() -> None:
    """An id between the tokenizer's and a padded model's vocabulary decodes to nothing."""
    assert TOKENIZER.decode([TOKENIZER.vocab_size + 7]) == ""


def test_lone_surrogates_are_refused() -> None:
    """L10: text that is not Unicode is an InvalidRequestError, not the library's TypeError."""
    with pytest.raises(InvalidRequestError, match="Unicode"):
        TOKENIZER.encode("a\ud800")


def test_a_panic_is_contained(capfd: pytest.CaptureFixture[str]) -> None:
    """T2: a panic inside the library (a BaseException) reaches the caller as InvalidRequestError."""
    bad = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    bad.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?:(a+)+)+b\1"), "isolated")
    with pytest.raises(InvalidRequestError, match="cannot encode"):
        Tokenizer(bad.to_str()).encode("a" * 40)
    capfd.readouterr()


def test_parts_of_characters_are_exact_bytes() -> None:
    """A token that is half a character shows its byte, and U+FFFD as text."""
    ids = TOKENIZER.encode("€")
    assert [TOKENIZER.token_bytes(i) for i in ids] == [b"\xe2", b"\x82", b"\xac"]
    assert TOKENIZER.token_text(ids[0]) == "\ufffd"


def test_sentencepiece_tokens_show_their_space_and_bytes() -> None:
    """The word mark is a space and <0xNN> a byte in vocabularies of the SentencePiece kind."""
    tokenizer = tokenizers.Tokenizer(models.BPE({"▁the": 0, "<0xE2>": 1}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    wrapped = Tokenizer(tokenizer.to_str())
    assert wrapped.token_bytes(0) == b" the"
    assert wrapped.token_bytes(1) == b"\xe2"


def test_no_bound_without_byte_tokens() -> None:
    """Where one unknown token can cover any text, min_tokens claims nothing."""
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert Tokenizer(words.to_str()).min_tokens("x" * 1000) == 0


def test_stored_truncation_and_padding_are_ignored() -> None:
    """A file saved with truncation never shortens or pads a prompt."""
    stored = tokenizers.Tokenizer.from_str(JSON)
    stored.enable_truncation(2)
    stored.enable_padding(length=50)
    assert len(Tokenizer(stored.to_str()).encode("hello there, world")) == len(TOKENIZER.encode("hello there, world"))


def write(directory: Path, **files: object) -> Path:
    """Write a tokenizer directory; names spell dots as double underscores."""
    (directory / "tokenizer.json").write_text(JSON)
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_from_directory_reads_template_and_names(tmp_path: Path) -> None:
    """The named tokens come in both spellings; a template file wins over the configuration's."""
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "pad_token": "x", "chat_template": "old"}
    tokenizer = Tokenizer.from_directory(write(tmp_path, tokenizer_config__json=config, chat_template__jinja="new"))
    assert tokenizer.named_special_tokens == {"eos_token": "<|im_end|>", "pad_token": "x"}
    assert tokenizer.chat_template == "new"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [("t", "t"), ([{"name": "tool_use", "template": "u"}, {"name": "default", "template": "d"}], "d"), (None, None)],
)
def test_template_spellings(tmp_path: Path, stored: object, expected: str | None) -> None:
    """The configuration holds one template, a list of named ones, or none."""
    write(tmp_path, tokenizer_config__json={"chat_template": stored})
    assert Tokenizer.from_directory(tmp_path).chat_template == expected


def test_named_templates_are_read_where_transformers_would(tmp_path: Path) -> None:
    """A template for conversations with tools is found in the list of a configuration, and in a file of its own."""
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    tokenizer = Tokenizer.from_directory(write(tmp_path, tokenizer_config__json={"chat_template": named}))
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("D", "T")
    write(tmp_path, chat_template__jinja="d")
    assert Tokenizer.from_directory(tmp_path).tool_template is None
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("d", "t")


@pytest.mark.parametrize("content", ["", "[", "[]", '{"chat_template": 3}'])
def test_broken_files_are_checkpoint_errors(tmp_path: Path, content: str) -> None:
    """A file that cannot be used is one CheckpointError that names it."""
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.from_directory(write(tmp_path, tokenizer_config__json=content))


def test_missing_or_broken_tokenizer_json(tmp_path: Path) -> None:
    """A directory without a readable tokenizer.json is a CheckpointError that names the file."""
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_import_is_light() -> None:
    """Importing the module loads neither tokenizers nor torch."""
    code = "import trio_llm.tokenizer, sys; assert not {'tokenizers', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


MANY_IDS = [TOKENIZER.encode("word")[0]] * 1_000_000


@pytest.mark.parametrize(
    "work",
    [
        lambda: TOKENIZER.encode("a long text of many words " * 20_000),
        lambda: TOKENIZER.decode(MANY_IDS),
    ],
)
def test_other_threads_run_while_a_long_text_is_tokenized(work: Callable[[], object]) -> None:
    """Tokenizing does not hold the GIL: a thread beside it is never stopped for as long as half of it takes."""
    over, gaps = threading.Event(), [0.0]

    def tick() -> None:
        before = time.perf_counter()
        while not over.is_set():
            now = time.perf_counter()
            gaps[0], before = max(gaps[0], now - before), now

    beside = threading.Thread(target=tick)
    beside.start()
    began = time.perf_counter()
    work()
    took = time.perf_counter() - began
    over.set()
    beside.join()
    assert gaps[0] < took / 2


@pytest.mark.parametrize("skip", [True, False])
def test_many_tokens_are_decoded_like_few(skip: bool) -> None:
    """A long decode goes another way, to the same text and the same refusals."""
    ids = [i % TOKENIZER.vocab_size for i in range(5000)]
    assert TOKENIZER.decode(ids, skip_special_tokens=skip) == TOKENIZER._tokenizer.decode(ids, skip_special_tokens=skip)
    for outside in (-1, 2**32):
        with pytest.raises(InvalidRequestError, match=rf"Token id {outside} is out of range: 0 to "):
            TOKENIZER.decode([*ids, outside])


def test_an_absurd_id_is_refused() -> None:
    """A vocabulary with an id of two billion took gigabytes of every mask before the server ended."""
    data = json.loads(TOKENIZER.json)
    data["model"]["vocab"]["far"] = 2**31
    with pytest.raises(CheckpointError, match="token id 2147483648: at most"):
        Tokenizer(json.dumps(data))
