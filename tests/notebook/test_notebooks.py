"""The committed notebooks are made of the committed cells, and all of them run from the first cell to the last."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in (NOTEBOOKS / "cells").glob("*.py"))

_spec = importlib.util.spec_from_file_location("build_notebooks", NOTEBOOKS / "build.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


def test_there_are_three() -> None:
    """Every notebook has its cells in the repository, and every file of cells its notebook."""
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES
    assert len(NAMES) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_made_of_its_cells(name: str) -> None:
    """A notebook and its cells do not drift apart; it is committed executed, without errors."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cells = build.read_cells(NOTEBOOKS / "cells" / f"{name}.py")
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in cells.cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


@pytest.mark.notebook
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs in a fresh kernel."""
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    build.execute(build.read_cells(NOTEBOOKS / "cells" / f"{name}.py"))
