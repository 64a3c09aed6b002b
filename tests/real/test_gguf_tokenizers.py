"""Tokenizers of published models, written into GGUF files and read from there: the ids of tokenizer.json."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gguf.tokenizers import write
from tests.real.corpus import TEXTS
from trio_llm.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
KINDS = [
    ("qwen3", "gpt2", "qwen2"),
    ("llama3_2", "gpt2", "llama-bpe"),
    ("llama2", "llama", None),
    ("gemma3", "llama", None),
    ("gemma3", "gemma4", None),
]


def corpus() -> list[str]:
    """Return texts of many scripts, pages and sources of this project, and random strings, the same every time."""
    pages = [ROOT / "README.md", ROOT / "trio_llm/grammar.py"]
    generator = random.Random(1)
    alphabets = [
        "ab \n",
        " \t\n\r'",
        "0123456789., ",
        "äöüß éà ",
        "日本語中文한국 ",
        "🙂🤗\u200d\ufe0f a",
        "".join(map(chr, range(32, 0x500))),
    ]
    strings = ["".join(generator.choices(letters, k=60)) for letters in alphabets for _ in range(10)]
    return [*TEXTS, *(page.read_text(encoding="utf-8") for page in pages), *strings]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model", "pre"), KINDS)
def test_ids_are_those_of_the_original(
    name: str, model: str, pre: str | None, tokenizer_files: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each text has the ids of tokenizer.json, also with control tokens that it spells, and decodes to the same."""
    original = Tokenizer.from_directory(tokenizer_files(name))
    ours = Tokenizer.from_directory(write(tokenizer_files(name), tmp_path / "model.gguf", model, pre))
    assert ours.vocab_size == original.vocab_size
    assert ours.special_tokens.items() >= original.special_tokens.items()
    spelled = "".join(f"{token} a\n" for token in [*original.special_tokens][:40])
    for text in [*corpus(), spelled]:
        ids = original.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == original.decode(ids)
    for text in [*TEXTS, spelled]:
        assert ours.encode_segments([(text, False)]) == original.encode_segments([(text, False)])
