"""The committed notebooks are made of the committed cells, and all of them run from the first cell to the last."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in (NOTEBOOKS / "cells").glob("*.py"))

_spec = importlib.util.spec_from_file_location("build_notebooks", NOTEBOOKS / "build.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


MAX_CELLS = 25


def test_every_notebook_has_its_cells() -> None:
    """Every notebook has its cells in the repository, and every file of cells its notebook."""
    assert NAMES
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_made_of_its_cells(name: str) -> None:
    """A notebook and its cells do not drift apart; it is committed executed, without errors."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cells = build.read_cells(NOTEBOOKS / "cells" / f"{name}.py")
    assert len(notebook.cells) <= MAX_CELLS
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in cells.cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """Return IPython itself, in this process: a kernel for each notebook would import torch each time."""
    config = Config({"HistoryManager": {"enabled": False}})
    yield InteractiveShell.instance(config=config)
    InteractiveShell.clear_instance()


@pytest.mark.notebook
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(
    name: str, shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every cell runs, what it asserts is true, and what it shows can be shown."""
    monkeypatch.chdir(NOTEBOOKS)
    for cell in build.read_cells(NOTEBOOKS / "cells" / f"{name}.py").cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()
    # A display that fails is a traceback, not an error.
    assert "Traceback" not in "".join(capsys.readouterr())
