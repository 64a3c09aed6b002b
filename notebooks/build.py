"""Make the notebooks from their cells: `python notebooks/build.py` turns cells/*.py into executed *.ipynb files.

With arguments, only those whose names begin so: `python notebooks/build.py 02 03`.

The cells are plain Python that a review can read: `# %% [markdown]` begins a text cell, `# %%` a code cell;
`# %magic` is a magic.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def read_cells(path: Path) -> NotebookNode:
    """Read a file of cells as a notebook without outputs."""
    cells: list[NotebookNode] = []
    for part in ("\n" + path.read_text(encoding="utf-8")).split("\n# %%")[1:]:
        kind, _, body = part.partition("\n")
        if kind.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append(new_markdown_cell("\n".join(lines)))
        else:
            lines = [line.removeprefix("# ") if line.startswith("# %") else line for line in body.strip().splitlines()]
            cells.append(new_code_cell("\n".join(lines)))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:02}"
    return new_notebook(cells=cells, metadata={"kernelspec": KERNEL})


def execute(notebook: NotebookNode, timeout_s: int = 120) -> NotebookNode:
    """Run all cells in a kernel of their own, in this directory; raises CellExecutionError where one fails."""
    client = NotebookClient(
        notebook,
        timeout=timeout_s,
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
        coalesce_streams=True,
    )
    return client.execute()


def main() -> None:
    for path in sorted((HERE / "cells").glob("*.py")):
        if not path.stem.startswith(tuple(sys.argv[1:] or [""])):
            continue
        notebook = execute(read_cells(path))
        nbformat.write(notebook, HERE / f"{path.stem}.ipynb")
        print(f"{path.stem}.ipynb: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main()
