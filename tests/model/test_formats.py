"""The table of formats in docs/models.md is what the readers make of each format."""

from __future__ import annotations

import re
from pathlib import Path

from tests.model import formats
from tests.test_docs import rows
from trio_llm.model.checkpoint.gguf import FORMATS
from trio_llm.model.checkpoint.quantized import grouping

HERE = Path(__file__).parent


def test_the_table_is_what_the_code_does() -> None:
    """Each row has the bits, the blocks and the error of today; `python -m tests.model.formats` prints the table."""
    written = [tuple(cell.strip("`") for cell in row) for row in rows("models", "All formats")]
    made = [tuple(cell.strip("`") for cell in row) for row in formats.rows()]
    assert written == made


def test_no_format_is_missing() -> None:
    """Each format of a GGUF file has a row, and each method of safetensors one at least."""
    names = [row[0] for row in formats.rows()]
    assert [name.removeprefix("GGUF ") for name in names if name.startswith("GGUF ")] == list(FORMATS)
    supported = re.split(r", | and ", grouping._SUPPORTED.removesuffix(" are").lower())
    assert {config["quant_method"] for _, _, config in formats.SAFETENSORS} == set(supported)


def test_the_proofs_are_tests() -> None:
    """Each name in the last column is that of a test of this folder."""
    sources = "".join(path.read_text(encoding="utf-8") for path in HERE.glob("test_*.py"))
    for proof in {row[-1] for row in formats.rows()}:
        assert re.search(rf"^def {proof}\(", sources, re.MULTILINE), proof
