"""`trio-llm verify` of a real model, as safetensors and as the GGUF file that it was made from."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from tests.real.smollm2 import GGUF_NAME
from trio_llm.config import EngineConfig
from trio_llm.verify import compare
from trio_llm.verify.compare import WAYS, verify

LENGTHS, NUM_TOKENS = (41, 1), 12  # a third of what the command computes; each way still goes through what it is about


@pytest.mark.slow
@pytest.mark.parametrize("file", ["", GGUF_NAME])
def test_a_real_model_is_what_transformers_computes(file: str, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty layers and 49,152 tokens, in 16 bits and in blocks of 4 bits, through all six ways."""
    monkeypatch.setattr(compare, "_LENGTHS", LENGTHS)
    monkeypatch.setattr(compare, "_NUM_TOKENS", NUM_TOKENS)
    monkeypatch.setattr(compare, "_GREEDY", attrs.evolve(compare._GREEDY, max_tokens=NUM_TOKENS))
    rows = verify(EngineConfig(model=str(smollm2 / file), num_kv_blocks=256))
    assert [row.way for row in rows] == list(WAYS)
    for row in rows:
        assert row.ok, row
        assert row.error < row.bound / 4
