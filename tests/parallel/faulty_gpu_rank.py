"""A rank with a fault, see faulty_rank.py, on a GPU that is pretended."""

from __future__ import annotations

import sys

import pytest

from tests.parallel import faulty_rank, gpus

if __name__ == "__main__":
    patch = pytest.MonkeyPatch()
    gpus.pretend(patch, [gpus.RankGpu(), gpus.RankGpu()])
    sys.exit(faulty_rank.main())
