"""The launcher for GPUs, against a stand-in for CuPy that keeps the rules of the real one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cuda_kernels import compile as compiling
from cuda_kernels.launch import CupyLauncher, kernel, using

NORM = kernel("norm.cu", "rms_norm", HIDDEN=64, THREADS=32)
ACT = kernel("act.cu", "act_and_mul", GELU=0)


class OnGpu(torch.Tensor):
    """A tensor that says it is on cuda:0."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def get_device(self) -> int:
        return 0


class FakeCupy(ModuleType):
    """What of CuPy 14 the launcher touches; one module per file, as CuPy keeps it."""

    POINTER = 0xABCD  # of any function

    def __init__(self) -> None:
        super().__init__("cupy")
        self.limits: dict[str, int] = {}  # file and function -> shared memory it may have
        self.launches: list[tuple[Any, ...]] = []
        self.loaded: list[str] = []
        self.current_stream = 1
        self.capturing = False

    def RawModule(self, *, path: str) -> SimpleNamespace:  # noqa: N802 - CuPy's name
        self.loaded.append(path)
        return SimpleNamespace(get_function=lambda name: FakeFunction(self, f"{path}:{name}"))


class FakeFunction:
    """`cupy.RawKernel`: refuses what the driver refuses."""

    def __init__(self, cupy: FakeCupy, name: str) -> None:
        self._cupy, self._name = cupy, name
        self.kernel = SimpleNamespace(ptr=cupy.POINTER)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._cupy.limits.get(self._name, 48 * 1024)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        self._cupy.limits[self._name] = size

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0, stream: Any = None) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes, "CUDA_ERROR_INVALID_VALUE"
        assert type(grid) is type(block) is type(args) is tuple
        assert all(arg is None or type(arg) in (int, np.int32, np.float32, np.uint64) for arg in args)
        self._cupy.launches.append((grid, block, args, shared_mem, stream.ptr))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    """Pretend to be on an H100 with CuPy installed."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    stream = lambda device: SimpleNamespace(cuda_stream=fake.current_stream)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    return fake


def rows(width: int = 64) -> torch.Tensor:
    """Make two rows of bfloat16 on the pretended GPU."""
    return torch.zeros(2, width, dtype=torch.bfloat16).as_subclass(OnGpu)


def test_a_launch_hands_over_grid_block_pointers_and_numbers(cupy: FakeCupy) -> None:
    """The function of the module's file gets addresses as int, numbers in their declared width, None as null."""
    x, weight, out = rows(), rows(), rows()
    with using(CupyLauncher()):
        NORM((2, 1, 1), (32, 1, 1), 4, x, weight, out, 64, 1e-6)
        NORM((2, 1, 1), (32, 1, 1), 4, x, None, out, 64, 1e-6)
    (grid, block, args, shared, _), (_, _, unweighted, _, _) = cupy.launches
    assert (grid, block, shared) == ((2, 1, 1), (32, 1, 1), 4)
    assert args == (x.data_ptr(), weight.data_ptr(), out.data_ptr(), np.int32(64), np.float32(1e-6))
    assert [type(arg) for arg in args] == [int, int, int, np.int32, np.float32] and unweighted[1] is None
    (path,) = cupy.loaded
    assert path.endswith(".cubin") and Path(path).read_bytes()[:4] == b"\x7fELF"


def test_the_stream_is_the_one_of_the_moment(cupy: FakeCupy) -> None:
    """Each launch goes to torch's current stream: one that was remembered would escape a graph's capture."""
    args = (rows(), rows(), rows(), 64, 1e-6)
    with using(CupyLauncher()):
        for cupy.current_stream in (111, 222):
            NORM((2, 1, 1), (32, 1, 1), 4, *args)
    assert [launch[4] for launch in cupy.launches] == [111, 222] and len(cupy.loaded) == 1


def test_shared_memory_is_asked_for_and_never_taken_back(cupy: FakeCupy) -> None:
    """Above 48 KiB a function asks before its launch; a smaller launch in between leaves the larger limit."""
    args = (rows(), rows(), rows(), 64, 1e-6)
    with using(CupyLauncher()):
        for size in (100_000, 60_000, 1000, 100_000, 120_000):
            NORM((2, 1, 1), (32, 1, 1), size, *args)
    assert [launch[3] for launch in cupy.launches] == [100_000, 60_000, 1000, 100_000, 120_000]
    assert list(cupy.limits.values()) == [120_000]


def test_each_specialisation_is_loaded_once(cupy: FakeCupy) -> None:
    """Another kernel is another file; the same again loads nothing."""
    with using(CupyLauncher()):
        for _ in range(2):
            NORM((2, 1, 1), (32, 1, 1), 4, rows(), rows(), rows(), 64, 1e-6)
            ACT((2, 1, 1), (256, 1, 1), 0, rows(), rows(32), 32, 64)
    assert len(cupy.loaded) == 2 and len(cupy.launches) == 4


def test_a_gpu_newer_than_the_compiler_gets_ptx(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest older architecture's PTX is loaded, for the driver to compile."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (99, 0))
    with using(CupyLauncher()):
        NORM((2, 1, 1), (32, 1, 1), 4, rows(), rows(), rows(), 64, 1e-6)
    (path,) = cupy.loaded
    assert path.endswith(".ptx") and ".entry rms_norm(" in Path(path).read_text()


def test_a_gpu_that_is_too_old_is_refused(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cp.async and bfloat16 tensor cores the kernels cannot work, and the message says so."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with using(CupyLauncher()), pytest.raises(compiling.CompileError, match=r"7\.5: the kernels need 8\.0"):
        NORM((2, 1, 1), (32, 1, 1), 4, rows(), rows(), rows(), 64, 1e-6)


def test_a_tensor_of_another_device_is_refused(cupy: FakeCupy) -> None:
    """A CPU tensor never reaches a GPU kernel as a pointer."""
    args = (rows(), torch.zeros(64, dtype=torch.bfloat16), rows(), 64, 1e-6)
    with using(CupyLauncher()), pytest.raises(TypeError, match="argument weight: is on cpu, not on cuda:0"):
        NORM((2, 1, 1), (32, 1, 1), 0, *args)
    assert not cupy.launches
