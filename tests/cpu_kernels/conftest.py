"""Tests of the CPU kernels need a C++ compiler; without one they are skipped, except in CI, where they fail."""

from __future__ import annotations

import os

import pytest

from cpu_kernels import library
from cpu_kernels.compile import CompileError, find_compiler


@pytest.fixture(scope="session", autouse=True)
def compiler() -> str:
    """Require a compiler, and load the kernels."""
    try:
        command = find_compiler()[0]
    except CompileError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must compile the kernels: {error}")
        pytest.skip(str(error))
    library.load()
    return command
