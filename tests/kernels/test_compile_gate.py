"""Every specialisation compiles for every architecture, keeps its registers, and uses the instructions it must."""

from __future__ import annotations

import pytest

from cuda_kernels.launch import Kernel
from tests.kernels.specialisations import ARCHS, attention, others

MUST_USE = {
    "paged_attn.cu": ("mma.sync.aligned.m16n8k16", "ldmatrix.sync.aligned.m8n8.x4", "cp.async.cg.shared.global"),
    "gemm.cu": ("mma.sync.aligned.m16n8k16", "ldmatrix.sync.aligned.m8n8.x4", "cp.async.cg.shared.global"),
    "norm.cu": ("ld.global.L1::no_allocate.v4.b32",),
    "act.cu": ("ld.global.L1::no_allocate.v4.b32",),
}


def gate(kernel: Kernel, arch: str) -> None:
    """Compile, and check the compiler's report."""
    built = kernel.build(arch)
    for entry, usage in built.usage.items():
        assert usage.spill_bytes == 0, f"{entry} spills {usage.spill_bytes} bytes at {usage.registers} registers"
    assert kernel.entry in built.usage
    for text in MUST_USE.get(kernel.source, ()):
        assert text in built.ptx


@pytest.mark.parametrize("kernel", {k.source: k for k in [*attention("sm_90"), *others()]}.values(), ids=str)
def test_kernels_compile(kernel: Kernel) -> None:
    """One specialisation of each, for one architecture."""
    gate(kernel, "sm_90")


@pytest.mark.kernels_full
@pytest.mark.parametrize("arch", ARCHS)
def test_every_specialisation_compiles(arch: str) -> None:
    """On all architectures, attention in every tile."""
    for kernel in [*attention(arch), *others()]:
        gate(kernel, arch)
