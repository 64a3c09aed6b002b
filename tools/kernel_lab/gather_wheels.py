"""Gather what a machine with torch, CuPy and transformers lacks to run `all`.

Such a machine may reach nothing. Wheels for its Python go into a folder that travels with this tree; there

    pip install --no-index --no-deps wheels/*.whl

installs them. What only a server or another test needs stays here.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
GLIBC_MINOR = 34  # of the machine: 2.34 or newer, as in every distribution since 2022
LIMIT_BYTES = 64 * 2**20
# Come with torch, CuPy and transformers.
THERE = {"huggingface-hub", "jinja2", "numpy", "pyyaml", "safetensors", "tokenizers", "torch", "tqdm", "transformers"}
# Of the extra `test`, what the tests of the engine on a GPU import or pytest's settings name.
TESTS = {"hypothesis", "jsonschema", "pytest", "pytest-timeout", "pytest-trio", "pytest-xdist"}


def requirements() -> list[str]:
    """Return what has to travel, as pyproject.toml asks for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = [one for one in project["dependencies"] if _name(one) not in THERE]
    return ours + [one for one in project["optional-dependencies"]["test"] if _name(one) in TESTS]


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def tree_bytes() -> int:
    """Return the bytes of the files that travel besides."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


@click.command()
@click.option("--python", "version", default="3.12", show_default=True, help="Of the machine with the GPU.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=ROOT / "wheels", show_default="wheels")
def main(version: str, out: Path) -> None:
    """Download the wheels with pip, for Linux on x86-64, and say what all that travels weighs."""
    out.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(GLIBC_MINOR, 16, -1)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", f"--python-version={version}"]
    # Markers of the requirements are those of this Python; the two of Quart fit 3.12 as they fit 3.11.
    subprocess.run([*command, *platforms, "-d", str(out), *requirements()], check=True)  # noqa: S603
    for name in THERE:
        for wheel in out.glob(f"{name.replace('-', '_')}-[0-9]*.whl"):
            wheel.unlink()  # a dependency of something, and there already
    wheels = sum(path.stat().st_size for path in out.glob("*.whl"))
    total = wheels + tree_bytes()
    mib = f"{len(list(out.glob('*.whl')))} wheels of {wheels / 2**20:.1f} MiB, with this tree {total / 2**20:.1f} MiB"
    if total > LIMIT_BYTES:
        raise click.ClickException(f"{mib}: more than {LIMIT_BYTES // 2**20}")
    click.echo(mib)


if __name__ == "__main__":
    main()
