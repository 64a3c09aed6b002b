"""Kernel tests run on the simulator; without any CUDA compiler they are skipped, except in CI, where they fail."""

from __future__ import annotations

import os

import pytest

from cuda_kernels.compile import compiler_version


@pytest.fixture(autouse=True)
def compiler() -> str:
    """Require NVRTC or nvcc."""
    version = compiler_version()
    if version is None:
        if os.environ.get("CI"):
            pytest.fail("CI must compile the kernels: pip install nvidia-cuda-nvrtc")
        pytest.skip("no CUDA compiler: pip install nvidia-cuda-nvrtc")
    return version
