"""Kernels of a graph that begin while the one before runs: how they are launched, and what they may do until then."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cuda_kernels import compile as compiling
from cuda_kernels import dependent
from cuda_kernels.launch import CupyLauncher, kernel, using
from cuda_kernels.signature import entries
from tests.kernels.test_cupy_launch import FakeCupy, cupy, rows
from tools.ptx_simulator import KernelFaultError, SimulatedLauncher

__all__ = ["cupy"]  # the fixture
NORM = kernel("norm.cu", "rms_norm", HIDDEN=64, THREADS=32)


@pytest.fixture
def captured(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Pretend that the current stream is captured; return what `dependent.launch` is given."""
    launches: list[tuple[Any, ...]] = []
    cupy.capturing = True
    monkeypatch.setattr(dependent, "launch", lambda *args: launches.append(args))
    return launches


def launch(*, args: Sequence[Any] | None = None) -> None:
    """Launch a norm of two rows."""
    NORM((2, 1, 1), (32, 1, 1), 4, *(args or (rows(), None, rows(), 64, 1e-6)))


def test_a_captured_launch_goes_to_the_driver(cupy: FakeCupy, captured: list[tuple[Any, ...]]) -> None:
    """The same function, sizes, stream and arguments as CuPy's own launch would have; CuPy launches the rest."""
    x, out = rows(), rows()
    with using(CupyLauncher()):
        launch(args=(x, None, out, 64, 1e-6))
    ((bindings, function, *sizes, stream, args),) = captured
    assert bindings is dependent.driver() and function == FakeCupy.POINTER and stream == 1
    assert sizes == [(2, 1, 1), (32, 1, 1), 4]
    assert args == [x.data_ptr(), None, out.data_ptr(), np.int32(64), np.float32(1e-6)]
    assert cupy.launches == []


@pytest.mark.parametrize("why", ["nothing is captured", "an older GPU", "not wanted", "no bindings"])
def test_other_launches_are_cupys(
    why: str, cupy: FakeCupy, captured: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Outside a capture, below compute capability 9.0, to compare, and, which is said once, without cuda.bindings."""
    dependent.driver.cache_clear()
    if why == "nothing is captured":
        cupy.capturing = False
    elif why == "an older GPU":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    elif why == "no bindings":
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with using(CupyLauncher(overlap=why != "not wanted")), caplog.at_level(logging.WARNING):
        launch()
        kernel("act.cu", "act_and_mul", GELU=0)((2, 1, 1), (256, 1, 1), 0, rows(), rows(32), 32, 64)
    assert len(cupy.launches) == 2 and captured == []
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (why == "no bindings")
    assert all("kernel of a graph waits for the one before" in one for one in said)
    dependent.driver.cache_clear()


# A driver that prints what it is asked for, and gives it back the status of the environment.
DRIVER = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { int id; char pad[4]; union { char bytes[64]; int allowed; } value; } Attribute;
typedef struct { unsigned grid[3], block[3], shared; void *stream; Attribute *attributes; unsigned count; } Config;
int cuLaunchKernelEx(const Config *c, void *function, void **p, void **extra) {
  printf("%p %u,%u,%u %u,%u,%u %u %p %u:%d=%d\n", function, c->grid[0], c->grid[1], c->grid[2], c->block[0],
         c->block[1], c->block[2], c->shared, c->stream, c->count, c->attributes->id, c->attributes->value.allowed);
  printf("%llx %llx %d %g %llx %d\n", *(unsigned long long *)p[0], *(unsigned long long *)p[1], *(int *)p[2],
         *(float *)p[3], *(unsigned long long *)p[4], extra == 0);
  fflush(stdout);
  return atoi(getenv("STATUS"));
}
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *result) {
  *found = dlsym(dlopen("libcuda.so.1", RTLD_LAZY), name);
  if (result) *result = *found ? 0 : 1;
  return 0;
}
int cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""
CALL = """
import sys, types
import numpy as np
from cuda_kernels import dependent

class CUDADriverError(RuntimeError):
    pass

sys.modules["cupy"] = types.SimpleNamespace(cuda=types.SimpleNamespace(driver=sys.modules[__name__]))
args = [0x7fff12345678, None, np.int32(-5), np.float32(1.5), np.uint64(2**63 + 1)]
try:
    dependent.launch(dependent.driver(), 0xabcd, (7, 2, 3), (128, 1, 1), 4096, 0x1234, args)
except CUDADriverError as error:
    print("status", error)
"""


@pytest.mark.parametrize("status", [0, 1])
def test_what_reaches_the_driver(status: int, tmp_path: Path) -> None:
    """NVIDIA's bindings hand over sizes, stream, one attribute and arguments of their width; errors are CuPy's."""
    (tmp_path / "driver.c").write_text(DRIVER)
    command = ["cc", "-shared", "-fPIC", "driver.c", "-o", "libcuda.so.1", "-ldl"]
    subprocess.run(command, cwd=tmp_path, check=True)
    paths = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), "STATUS": str(status)}
    done = subprocess.run(
        [sys.executable, "-c", CALL], env={**os.environ, **paths}, capture_output=True, text=True, check=True
    )  # fmt: skip
    launched, args, *failed = done.stdout.splitlines()
    assert launched == "0xabcd 7,2,3 128,1,1 4096 0x1234 1:6=1"
    assert args == "7fff12345678 0 -5 1.5 8000000000000001 1"
    assert failed == (["status 1"] if status else [])


COMMON = '#include "common.cuh"\n'
DECLARED = 'extern "C" __global__ void k(EARLY const int* weight, const int* x, int* y)'
FINE = "int v = weight[threadIdx.x]; wait_for_kernels_before(); y[threadIdx.x] = v + x[threadIdx.x];"
RACES = {
    "a read": FINE.replace("int v = weight", "int v = x"),
    "a read of a part": FINE.replace("int v = weight[threadIdx.x]", "int v = (threadIdx.x ? weight : x)[threadIdx.x]"),
    "a write": FINE.replace("int v", "y[0] = 0; int v"),
    "an atomic": FINE.replace("int v", "atomicAdd(y, 1); int v"),
    "a copy": "DYN_SMEM(int, s); copy4_async(s, x, true); copies_commit();" + FINE + "copies_wait<0>();",
    "some threads that do not wait": FINE.replace("wait", "if (threadIdx.x < 16) wait"),
    "threads that end": FINE.replace("wait", "if (threadIdx.x >= 16) return; wait"),
    "no wait": "",
}  # fmt: skip


def run(body: str, arch: str) -> torch.Tensor:
    """Run a kernel of this body as part of a graph; return what it wrote."""
    source = f"{compiling.expand('common.cuh')} {DECLARED} {{ {body} }}"
    early = [p.early for p in entries(source)["k"]] if arch == "compute_90" else None
    weight, x, y = torch.arange(32).int(), torch.full((32,), 100).int(), torch.zeros(32).int()
    ptx = compiling.build_text(source, "test.cu", {}, arch).ptx
    launcher = SimulatedLauncher(arch)
    launcher.launch_ptx(ptx, "k", (1, 1, 1), (32, 1, 1), 64, (weight, x, y), (False, False, True), early)
    return y


@pytest.mark.parametrize("race", RACES)
def test_what_must_wait_is_refused(race: str) -> None:
    """Before the kernels before have ended, nothing is written, and nothing read that they may write."""
    with pytest.raises(KernelFaultError, match=r"before griddepcontrol\.wait|has not waited"):
        run(RACES[race], "compute_90")


@pytest.mark.parametrize("arch", ["compute_80", "compute_90"])
def test_weights_may_be_read_early(arch: str) -> None:
    """What is declared EARLY is read before; older architectures have no such launch, and wait for nothing."""
    assert run(FINE, arch).tolist() == list(range(100, 132))
