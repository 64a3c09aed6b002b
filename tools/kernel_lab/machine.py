"""What this machine is, and the most it can do: every measurement is set against these ceilings, not a data sheet's."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import statistics
import subprocess
import time
from typing import Any

import torch

from cuda_kernels.compile import compiler_version
from cuda_kernels.launch import kernel
from tools.kernel_lab.device import Call, Captured, Device, interleaved_us

READ_THREADS, READ_BLOCKS = 512, 132 * 8  # enough to keep memory busy on any GPU of today
LAUNCHES = 500  # fewer than a GPU queues before the host has to wait


def environment(device: Device) -> dict[str, Any]:
    """Name the machine and what runs on it."""
    found: dict[str, Any] = {
        "compiler": compiler_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("cupy-cuda12x", "cupy-cuda13x", "cuda-bindings", "transformers")},
    }
    if device.sim:
        return {**found, "gpu": "simulated"}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    asked = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    driver, *limits = _ask_driver(asked).split(", ")
    return {
        **found, "gpu": properties.name, "driver": driver, "max clocks and power": limits,
        "capability": f"{properties.major}.{properties.minor}", "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory, "cache_bytes": device.cache_bytes,
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_driver(fields: str) -> str:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "unknown"
    command = [smi, f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()  # noqa: S603


def ceilings(device: Device) -> list[tuple[str, Call]]:
    """Return what to measure, by name; each gives a number in the unit of its name (NaN where nothing is measured)."""
    return [
        ("read_gb_s", lambda: _read(device)),
        ("copy_gb_s", lambda: _copy(device)),
        ("bf16_tflop_s", lambda: _matmul(device)),
        ("launch_us", lambda: _launch(device)),
        ("graph_node_us", lambda: _graph_node(device)),
        ("graph_node_waiting_us", lambda: _waiting_node(device)),
    ]


def _us(device: Device, captured: Captured, calls: int = 1) -> float:
    return statistics.mean(interleaved_us(device, {"it": (captured, calls)})["it"])


def _read(device: Device) -> float:
    """Read 1 GiB by our own kernel; what it read must be right."""
    blocks, threads = (2, 64) if device.sim else (READ_BLOCKS, READ_THREADS)
    x = torch.randint(
        -(2**31), 2**31, (4096 if device.sim else 1 << 28,), dtype=torch.int32, device=device.torch_device
    )
    out = x.new_zeros(blocks * threads)
    read = kernel("primitives.cu", "read_all")

    def call() -> torch.Tensor:
        read((blocks, 1, 1), (threads, 1, 1), 0, x, out, len(x) // 4)
        return out

    captured = device.capture([call])
    captured.replay()
    if _xor(out) != _xor(x):
        raise ArithmeticError("read_all read something else than what is there")
    return x.nbytes / _us(device, captured) / 1000


def _xor(x: torch.Tensor) -> int:
    while len(x) > 1:
        half, odd = len(x) // 2, x[len(x) // 2 * 2 :]
        x = torch.cat((x[:half] ^ x[half : 2 * half], odd))
    return int(x)


def _copy(device: Device) -> float:
    source = torch.zeros(4096 if device.sim else 1 << 29, dtype=torch.int16, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _us(device, device.capture([lambda: target.copy_(source)])) / 1000


def _matmul(device: Device) -> float:
    n = 32 if device.sim else 8192
    a, b = (torch.randn(n, n, device=device.torch_device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _us(device, device.capture([lambda: torch.mm(a, b, out=out)])) / 1e6


def _launch(device: Device) -> float:
    """Return what the host spends on a launch of a kernel that does nothing."""
    empty = kernel("primitives.cu", "nothing")
    times: list[float] = []
    for _ in range(2 if device.sim else 20):
        device.synchronize()
        begin = time.perf_counter()
        for _ in range(2 if device.sim else LAUNCHES):
            empty((1, 1, 1), (32, 1, 1), 0, None)
        times.append((time.perf_counter() - begin) / LAUNCHES * 1e6)
    return float("nan") if device.sim else statistics.median(times)


def _graph_node(device: Device) -> float:
    """Return what each kernel of a replayed graph takes when it does nothing."""
    empty = kernel("primitives.cu", "nothing")
    count = 2 if device.sim else 1000
    return _us(device, device.capture([lambda: empty((1, 1, 1), (32, 1, 1), 0, None)] * count), count)


def _waiting_node(device: Device) -> float:
    """Return the same where each kernel begins after the one before: what programmatic dependent launch saves."""
    with device.waiting():
        return _graph_node(device)
