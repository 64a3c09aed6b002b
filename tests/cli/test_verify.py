from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tests.gguf.files import write
from tests.model.families import make_oracle, save
from tests.model.quantized_files import gptq, quantize_checkpoint
from trio_llm.__main__ import main
from trio_llm.core.prefix import Chain
from trio_llm.model.paged import rope
from trio_llm.verify.compare import TOLERANCE, WAYS

Verify = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Verify]:
    """Return a function that runs the command and returns its exit code and rows."""

    def run(path: Path) -> tuple[int, list[dict[str, Any]]]:
        monkeypatch.setattr(sys, "argv", ["trio-llm", "verify", str(path), "--json"])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), [json.loads(line) for line in printed.out.splitlines()]

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def assert_equal(found: tuple[int, list[dict[str, Any]]]) -> None:
    """Check that every way gives what transformers gives, far below its bound."""
    code, rows = found
    assert [row["way"] for row in rows] == list(WAYS)
    for row in rows:
        assert row["ok"] and row["equal"] == row["tokens"] == 16 * 20, row
        assert row["went_through"] > 0
        assert row["error"] < row["bound"] / 4
    assert code == 0


@pytest.mark.parametrize("family", ["llama3-rope-gqa-tied", "qwen3-moe", "gemma4-wrapper"])
def test_a_checkpoint_is_what_transformers_computes(family: str, verify: Verify, tmp_path: Path) -> None:
    """Safetensors as they are, through all six ways."""
    assert_equal(verify(save(make_oracle(family), tmp_path / "model")))


@pytest.mark.parametrize("family", ["llama3-rope-gqa-tied", "mixtral", "gemma4-26b"])
def test_a_gguf_file_is_compared_on_its_widened_weights(family: str, verify: Verify, tmp_path: Path) -> None:
    """Names, experts, permutations and factors of frequencies reach transformers as its own files would."""
    assert_equal(verify(write(make_oracle(family), tmp_path / "model.gguf", lambda _: gguf.GGMLQuantizationType.F16)))


def test_a_quantised_checkpoint_is_compared_on_its_widened_weights(verify: Verify, tmp_path: Path) -> None:
    """GPTQ's packed weights are widened for both."""
    directory = save(make_oracle("llama"), tmp_path / "plain")
    pack = gptq(act_order=False, symmetric=True, group_size=16)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
    quantize_checkpoint(directory, tmp_path / "model", lambda _: lambda weight: pack(weight.float()), config)
    assert_equal(verify(tmp_path / "model"))


def test_a_model_that_computes_something_else_fails(
    verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frequencies that are one percent off are found in every way: exit code 1."""
    right = rope._base
    monkeypatch.setattr(rope, "_base", lambda theta, dim: right(theta, dim) * 1.01)
    code, rows = verify(save(make_oracle("qwen3"), tmp_path / "model"))
    assert code == 1
    assert not any(row["ok"] for row in rows)
    assert all(row["error"] > row["bound"] for row in rows)


def test_a_fault_of_one_way_is_that_way_alone(verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix cache that returns other tokens' blocks shows in the row of the cache."""
    monkeypatch.setattr(Chain, "block", lambda self, index, size: (str(index).encode(), b"the same"))
    code, rows = verify(save(make_oracle("qwen3"), tmp_path / "model"))
    assert code == 1
    assert {row["way"] for row in rows if not row["ok"]} >= {"prefix cache"}
    assert {row["way"] for row in rows if row["ok"]} >= {"one at a time", "batches", "chunks"}


def test_the_table_says_what_was_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --json there is a row for each way, with its bound."""
    monkeypatch.setattr(sys, "argv", ["trio-llm", "verify", str(save(make_oracle("qwen2"), tmp_path / "model"))])
    with pytest.raises(SystemExit) as end:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    assert [line.split("  ")[0] for line in lines[1:]] == list(WAYS)
    assert all(line.endswith("equal") and "320 / 320" in line for line in lines[1:])


def test_without_transformers_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library is optional; without it the command is an error with the one that installs it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    directory = tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["trio-llm", "verify", str(directory)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "pip install 'trio-llm[verify]'" in capsys.readouterr().err


def test_the_bound_is_documented() -> None:
    """The page states the bound that the command uses."""
    page = (Path(__file__).parents[2] / "docs/exactness.md").read_text(encoding="utf-8")
    assert f"{TOLERANCE:.2%} of the largest logit" in page
