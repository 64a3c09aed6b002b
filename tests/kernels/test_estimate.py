"""The estimate of docs/gpu.md is what the script says, and follows from what a step launches and moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.compilers import is_older
from tools.kernel_lab import estimate, ledger
from tools.kernel_lab.estimate import Cost, Part
from tools.kernel_lab.recorded_step import Operation
from tools.kernel_lab.shapes import MODELS

PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
TOLERANCE, OLDER = 0.05, 0.15  # between compilers, and to one before 13.5


def cells(table: str) -> list[list[str]]:
    """Take a table of Markdown apart."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]


def differences(stated: str, made: str, tolerance: float = TOLERANCE) -> list[tuple[str, str]]:
    """Return the cells that differ by more than compilers do."""
    one, other = cells(stated), cells(made)
    assert [len(row) for row in one] == [len(row) for row in other]
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return [pair for pair in pairs if not is_close(*pair, tolerance)]


def is_close(stated: str, made: str, tolerance: float) -> bool:
    """Compare numbers within the tolerance, or a unit of the last place, and anything else exactly."""
    try:
        numbers = float(stated), float(made)
    except ValueError:
        return stated == made
    unit = 10.0 ** -len(stated.partition(".")[2])
    return numbers[0] == pytest.approx(numbers[1], rel=tolerance, abs=1.01 * unit)


@pytest.mark.slow
def test_the_page_has_the_table() -> None:
    """Between its marks stands what `python -m tools.kernel_lab estimate --write docs/gpu.md` puts there."""
    stated = PAGE.split("<!-- estimate: begin -->")[1].split("<!-- estimate: end -->")[0]
    made = estimate.table()
    assert differences(stated, made, OLDER if is_older() else TOLERANCE) == []
    # Of Qwen2.5-0.5B, one row: as many launches as are counted elsewhere, and bytes of all weights and the context.
    whole = next(row for row in cells(made) if row[:2] == ["Qwen2.5-0.5B, B=1", "whole step"])
    assert whole[2] == "149" and 0.99e3 < float(whole[3]) < 1.03e3


def test_another_number_is_another_table() -> None:
    """A tenth more, another limit, or a measurement that appeared are differences; a compiler's percent is none."""
    assert differences("| a | 100 | memory | |", "| a | 102 | memory | |") == []
    for other in ("| a | 110 | memory | |", "| a | 100 | launches | |", "| a | 100 | memory | 7 |"):
        assert len(differences("| a | 100 | memory | |", other)) == 1


def test_a_part_says_what_limits_it() -> None:
    """The slowest of a launch's limits is its time, most of a part's time its limit."""
    slow = Cost(4e6, 1e3, memory_s=2e-6, issue_s=1e-6, flight_s=5e-6, flops_s=0.0)
    assert (slow.limit, slow.seconds) == ("loads in flight", 5e-6)
    part = Part([(slow, 3)], launching_s=2e-6)
    assert part.seconds == pytest.approx(17e-6) and part.limit == "loads in flight"
    assert (part.launches, part.num_bytes, part.instructions) == (3, 12e6, 3e3)
    assert Part([(slow, 3)], launching_s=2e-5).limit == "launches"


def test_products_of_cublas_are_bytes_and_operations() -> None:
    """Few rows are bound by the weights' bytes, many by the tensor cores."""
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    for rows, limit in ((16, "memory"), (4096, "tensor cores")):
        x = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
        cost = estimate.estimate_operation(Operation("linear", [x, weight], [x]))
        assert cost.limit == limit and cost.num_bytes == weight.nbytes + 2 * x.nbytes


def test_what_was_measured_stands_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of benches add up by layers; those of a source that has changed since are left out."""
    shape, model = MODELS["Qwen3-8B"], "Qwen3-8B"
    times = {f"{name} of {model}, 1 rows": 10.0 for name, *_ in shape.linears()}
    times |= {f"decode {model} B=1 2048 in a graph": 3.0}
    measured = {group: estimate._measured(model, shape, 1, group, times) for group in estimate.GROUPS}
    assert measured == {"linear layers": 40.0 * 36, "head": 10.0, "attention": 3.0 * 36, "the rest": None}
    del times[f"down of {model}, 1 rows"]
    assert estimate._measured(model, shape, 1, "linear layers", times) is None
    entries: dict[str, Any] = {
        "engine": {"times": {f"step of {model}, B=1": {"us": 5000.0}}}, "gemv.cu": {"times": {"x": {"us": 1.0}}},
    }  # fmt: skip
    monkeypatch.setattr(ledger, "read", lambda path=None: entries)
    assert estimate.measured_us() == {f"step of {model}, B=1": 5000.0}
