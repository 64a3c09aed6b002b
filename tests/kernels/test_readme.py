"""What cuda_kernels/README.md and IDEAS.md say, held to the sources."""

from __future__ import annotations

import re

import torch

from cuda_kernels import compile as compiling
from cuda_kernels.tuning import BY_ARCHITECTURE, tuning
from tools.kernel_lab.specialisations import ARCHS

README, IDEAS = ((compiling.SOURCES / name).read_text(encoding="utf-8") for name in ("README.md", "IDEAS.md"))


def test_the_permutation_is_the_kernels() -> None:
    """Bytes of a lane and the k-indices they stand for, as `load_queries` places pairs of dimensions."""
    rows = re.findall(r"^\| ([0-3]) \| ([\d ]+) \| ([\d ]+) \|$", IDEAS, re.M)
    table = {int(byte): int(k) for _, own, ks in rows for byte, k in zip(own.split(), ks.split(), strict=True)}
    placed = "place = pair / 8 * 8 + pair % 2 * 4 + pair % 8 / 2"
    assert placed in compiling.expand("paged_attn.cu")
    assert table == {2 * pair + i: 2 * (pair % 2 * 4 + pair % 8 // 2) + i for pair in range(8) for i in range(2)}


def test_every_file_is_named() -> None:
    """The table has each source; each Python name in backquotes that ends in .py or .cu is there."""
    assert all(f"`{path.name}`" in README for path in compiling.SOURCES.glob("*.cu"))
    root = compiling.SOURCES.parent
    named = re.findall(r"`([\w./]+\.(?:py|cu|cuh))`", README + IDEAS)
    places = ("", "cuda_kernels", "tests/kernels")
    assert [name for name in named if not any((root / place / name).exists() for place in places)] == []


def test_every_architecture_has_its_numbers() -> None:
    """The table has a row for each that kernels are compiled for."""
    assert {f"sm_{major}{minor}" for major, minor in BY_ARCHITECTURE} == set(ARCHS)
    assert tuning(torch.device("cpu")) == BY_ARCHITECTURE[9, 0]
