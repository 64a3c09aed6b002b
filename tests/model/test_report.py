"""The README's table of exactness is held to the families, to the bounds, and to a measurement made again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.model.families import FAMILIES
from tests.model.golden import FP32_TOLERANCE
from tests.model.report import BEGIN, END, HEAD, README, measure
from tests.model.test_reduced_precision import MODES, SPARSE
from trio_llm.model.registry import FAMILIES as ARCHITECTURES


def table() -> list[dict[str, str]]:
    """Return the rows that stand between the markers, by column."""
    text = README.read_text(encoding="utf-8").split(BEGIN, 1)[1].split(END, 1)[0]
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
