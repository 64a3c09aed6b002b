"""Every specialisation compiles for every architecture, keeps its registers, and uses the instructions it must."""

from __future__ import annotations

import os

import attrs
import pytest

from cuda_kernels import compile as compiling
from cuda_kernels.compile import Usage
from cuda_kernels.launch import Kernel, kernel
from cuda_kernels.signature import entries
from tools.kernel_lab import specialisations
from tools.kernel_lab.specialisations import ARCHS, attention, inspect, others


@pytest.mark.parametrize("one", {k.source: k for k in [*attention("sm_90"), *others()]}.values(), ids=str)
def test_kernels_compile(one: Kernel) -> None:
    """One specialisation of each, for one architecture: no spill, the expected instructions."""
    made = list(inspect(one, "sm_90"))
    assert {m.entry for m in made} == set(compiling.build(one.source, dict(one.defines), "sm_90").usage)
    assert all(m.usage is not None and m.usage.registers for m in made)
    assert [m.fault for m in made if m.fault] == []


@pytest.mark.kernels_full
@pytest.mark.parametrize("arch", ARCHS)
def test_every_specialisation_compiles(arch: str) -> None:
    """On all architectures, attention in every tile."""
    kernels = [*attention(arch), *others()]
    jobs = [(k.source, dict(k.defines), arch) for k in kernels]
    assert set(compiling.build_all(jobs, os.cpu_count() or 1)) == {None}
    faults = [(m.kernel, m.fault) for k in kernels for m in inspect(k, arch) if m.fault]
    assert faults == []


def test_faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spill, and an instruction that is not there, are named."""
    norm = kernel("norm.cu", "rms_norm", HIDDEN=64, THREADS=32)
    monkeypatch.setitem(specialisations.NEEDED, "rms_norm", ("mma.sync", "ld.global"))
    made = next(m for m in inspect(norm, "sm_90") if m.entry == "rms_norm")
    assert made.fault == "lacks mma.sync"
    assert attrs.evolve(made, usage=Usage(255, 8)).fault == "spills 8 bytes at 255 registers"
    ptx_alone = list(inspect(norm, "compute_90"))
    assert [(m.entry, m.usage) for m in ptx_alone] == [("rms_norm", None)]


def test_every_kernel_is_in_the_gate() -> None:
    """No source and no entry point escapes it, and what must be found belongs to one that is there."""
    named = {k.source for k in [*attention("sm_90"), *others()]}
    assert named == {path.name for path in compiling.SOURCES.glob("*.cu")}
    declared = {entry for source in named for entry in entries(compiling.expand(source))}
    assert declared >= set(specialisations.NEEDED)
