"""The table in docs/exactness.md is held to the families, to the bounds, and to a measurement made again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.model import report
from tests.model.families import FAMILIES
from tests.model.golden import FP32_TOLERANCE
from tests.model.report import BEGIN, END, HEAD, PAGE, Row, measure
from tests.model.test_reduced_precision import MODES, SPARSE
from trio_llm.model.families.registry import FAMILIES as ARCHITECTURES


def table() -> list[dict[str, str]]:
    """Return the rows that stand between the markers, by column."""
    text = PAGE.read_text(encoding="utf-8").split(BEGIN, 1)[1].split(END, 1)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()]
    assert rows[0] == list(HEAD)
    return [dict(zip(HEAD, row, strict=True)) for row in rows[2:]]


def numbers(cell: str) -> list[float]:
    """Return the numbers of a cell; percentages as shares."""
    found = re.findall(r"([\d.,]*\d(?:e-?\d+)?)(%?)", cell)
    return [float(number.replace(",", "")) / (100 if percent else 1) for number, percent in found]


def test_every_family_stands_in_the_table() -> None:
    """One row per checkpoint of the tests, in their order, and none of the registry's architectures is missing."""
    assert [row["family"] for row in table()] == list(FAMILIES)
    assert {row["architecture"].strip("`") for row in table()} == set(ARCHITECTURES)


@pytest.mark.parametrize("row", table(), ids=lambda row: row["family"])
def test_every_row_keeps_its_bounds(row: dict[str, str]) -> None:
    """Logits within the tolerance, every greedy token equal, reduced precisions within the bounds that are tested."""
    assert 0 < numbers(row["max logit difference, fp32"])[0] < FP32_TOLERANCE
    equal, generated = numbers(row["greedy tokens equal"])
    assert equal == generated == 7 * 16 * 10
    for column, mode in (("bf16", "bfloat16"), ("INT8 KV", "int8-kv"), ("INT8 weights", "int8-weights")):
        _, dense_rms, dense_kl, sparse_kl = MODES[mode]
        rms, kl = numbers(row[f"{column}: error, KL"])
        assert kl < sparse_kl if row["family"] in SPARSE else (rms < dense_rms and kl < dense_kl)
    for column in ("INT8 KV bytes / bf16", "INT8 weight bytes / bf16"):
        assert 0.5 < numbers(row[column])[0] < 0.8


def test_the_script_writes_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running it replaces the table and nothing else; --check leaves the file as it is."""
    path = tmp_path / "exactness.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    row = Row("x", "XForCausalLM", "1 layer", 1e-6, 1120, 1120, 3, (0.01, 1e-4), (0.02, 2e-4), 0.6, (0.03, 3e-4), 0.5)
    monkeypatch.setattr(report, "PAGE", path)
    monkeypatch.setattr(report, "FAMILIES", {"x": None})
    monkeypatch.setattr(report, "measure", lambda name, directory: row)
    threads = torch.get_num_threads()
    assert report.main(["--check"]) == 0
    assert "\nold\n" in path.read_text()
    assert report.main([]) == 0
    torch.set_num_threads(threads)
    assert path.read_text() == f"before\n{report.render([row])}\nafter\n"
    assert "| 1.0%, 1.0e-04 | 2.0%, 2.0e-04 | 0.60 |" in path.read_text()


def test_a_row_is_what_is_measured(tmp_path: Path) -> None:
    """Measured again, a row has the same text where figures are exact, and nearly the same numbers elsewhere."""
    name = "gemma4-e2b"
    told = next(row for row in table() if row["family"] == name)
    again = dict(zip(HEAD, measure(name, tmp_path).cells(), strict=True))
    exact = ("architecture", "shape", "greedy tokens equal", "INT8 KV bytes / bf16", "INT8 weight bytes / bf16")
    assert [told[column] for column in exact] == [again[column] for column in exact]
    for column in set(HEAD) - set(exact) - {"family"}:
        for one, other in zip(numbers(told[column]), numbers(again[column]), strict=True):
            assert 0.3 < one / other < 3, column
