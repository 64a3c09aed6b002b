"""What the kernels are built of, each alone against its definition: shuffles, votes, conversions, copies, mma, exp.

The definitions are numpy's, in integers or float64; the same functions judge the simulator in its self-test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cuda_kernels.launch import kernel
from tools.kernel_lab.device import Device

N, LANES = 200, 256
# Largest relative error, by the PTX ISA (2^-22 for ex2, lg2 and rsqrt, one unit for rcp) and what is made of them;
# of lg2 and tanh it is a part of 1, as they pass through zero.
APPROXIMATIONS: dict[str, tuple[Callable[[Any], Any], float, bool]] = {
    "ex2": (np.exp2, 2**-21.5, False),
    "lg2": (lambda x: np.log2(np.abs(x)), 2**-20, True),
    "rcp": (lambda x: 1 / x, 2**-22, False),
    "rsqrt": (lambda x: 1 / np.sqrt(np.abs(x)), 2**-21.5, False),
    "tanh": (np.tanh, 2**-20, True),
    "silu": (lambda x: x / (1 + np.exp(-x)), 2**-18, False),
    "gelu": (lambda x: 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3))), 2**-18, True),
}


def checks(device: Device) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Yield what to run, by name; each returns its errors and raises ArithmeticError where one is too large."""
    yield "integers and floats", lambda: check_primitives(device)
    for fp16 in (0, 1):
        name = ("bfloat16", "float16")[fp16]
        yield f"tensor cores {name}", lambda fp16=fp16: check_product(device, fp16)
        yield f"roundings {name}", lambda fp16=fp16: check_roundings(device, fp16)
    yield "tensor cores int8", lambda: check_product_s8(device)
    yield "asynchronous copies", lambda: check_copies(device)
    yield "approximations", lambda: check_approximations(device)


def require(held: bool, what: str) -> None:
    """Fail a check."""
    if not held:
        raise ArithmeticError(f"primitives.cu: {what}")


def check_primitives(device: Device) -> dict[str, float]:
    """Run shuffles, votes, bit operations, division, atomics and divergent loops."""
    given = np.zeros(LANES, np.int64)
    given[:N] = np.random.default_rng(0).integers(0, 1000, N)
    out = torch.zeros(LANES, 10, dtype=torch.int32, device=device.torch_device)
    floats, histogram = torch.zeros(LANES, 4, device=device.torch_device), out.new_zeros(9)
    values = torch.from_numpy(given[:N].astype(np.int32)).to(device.torch_device)
    launched = kernel("primitives.cu", "primitives")
    launched((2, 1, 1), (128, 1, 1), 4096, values, out, floats, histogram, N)
    require((out.cpu().numpy().view(np.uint32) == expected_integers(given)).all(), "integers differ")
    expected, actual = expected_floats(given), floats.cpu().numpy()
    error = np.abs(actual - expected) / (np.abs(expected) + 0.1)
    require(bool(error[:, :3].max() < 2e-5 and error[:, 3].max() < 8e-3), f"floats are off by {error.max(0)}")
    counts = [*np.bincount(given % 8, minlength=8), given[given % 3 == 0].max()]
    require(histogram.tolist() == counts, "atomics miscount")
    return {"error": float(error[:, :3].max())}


def expected_integers(v: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return what `primitives` writes to `out`, computed in Python integers."""
    lane, out = np.arange(LANES) % 32, np.zeros((LANES, 10), np.uint32)
    warp = np.arange(LANES) - lane
    out[:, 0] = v[np.where(lane + 3 < 32, warp + lane + 3, warp + lane)]
    out[:, 1] = v[np.where(lane >= 5, warp + lane - 5, warp + lane)]
    out[:, 2] = v[warp + lane * 7 % 32]
    out[:, 3] = v[warp + (lane & 16) + ((lane & 15) ^ 9)]
    for i, value in enumerate(int(x) for x in v):
        mates = v[warp[i] : warp[i] + 32]
        out[i, 4] = sum(int(m & 1) << k for k, m in enumerate(mates))
        out[i, 5] = value.bit_count() + (32 - (value | 1).bit_length()) * 100
        out[i, 6] = int((mates > 990).any()) + 2
        pool = (value & 0xFFFFFFFF | (~value & 0xFFFFFFFF) << 32).to_bytes(8, "little")
        out[i, 7] = int.from_bytes(bytes(pool[k] for k in (4, 2, 5, 3)), "little")
        high = (value * 2654435761 & 0xFFFFFFFF) * 0x9E3779B9 >> 32
        both, by = (~value & 0xFFFFFFFF) << 32 | value, value & 31
        out[i, 8] = high ^ (both << by >> 32 & 0xFFFFFFFF)
        out[i, 9] = (-(value // 7) * 31 + value % 9 + (value >> 3) // 5) & 0xFFFFFFFF
    return out


def expected_floats(v: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what `primitives` writes to `floats`, in float64."""
    a = v * np.float64(np.float32(0.01))
    for k in range(3):
        a = np.where((v & 3) > k, np.sqrt(a + k) / np.sqrt(1 + a), a)
    gelu = 0.5 * a * (1 + np.tanh(0.7978845608028654 * (a + 0.044715 * a**3)))
    signed = np.frombuffer((v.astype(np.uint64) * 2654435761 % 2**32).astype(np.uint32).tobytes(), np.int8)
    out = np.zeros((LANES, 4))
    out[:, 0] = np.where(v & 16, a, -a + v % 7)
    out[:, 1] = np.tanh(a) + a / (1 + np.exp(-a)) + gelu + np.log2(1 + a)
    out[:, 2] = signed.reshape(-1, 4) @ np.array([1.0, 256, 65536, 7])
    out[:, 3] = a * 1.001 + 3 * a + np.rint(a.astype(np.float32) * np.float32(7.3))
    return out


def check_product(device: Device, fp16: int) -> dict[str, float]:
    """Multiply through cp.async, ldmatrix, its transpose and mma.sync: small integers come out to the last bit."""
    torch.manual_seed(0)
    dtype = torch.float16 if fp16 else torch.bfloat16
    a, b = torch.randint(-9, 9, (16, 16)).to(dtype), torch.randint(-9, 9, (16, 8)).to(dtype)
    out, out_t = (torch.full((16, 8), torch.nan, device=device.torch_device) for _ in range(2))
    given = [x.to(device.torch_device) for x in (a, b, b.T.contiguous())]
    kernel("primitives.cu", "product", IO_FP16=fp16)((1, 1, 1), (32, 1, 1), 4096, *given, out, out_t)
    exact = a.float() @ b.float()
    require(torch.equal(out.cpu(), exact), "a product differs")
    require(torch.equal(out_t.cpu(), exact), "a product with the transpose differs")
    return {"error": 0.0}


def check_product_s8(device: Device) -> dict[str, float]:
    """Multiply every int8, and add to sums that come near the ends of the range."""
    torch.manual_seed(0)
    a, bt = (torch.randint(-128, 128, (rows, 32), dtype=torch.int8) for rows in (16, 8))
    c = torch.randint(-(2**31) + 2**20, 2**31 - 2**20, (16, 8), dtype=torch.int32)
    out = torch.zeros(16, 8, dtype=torch.int32, device=device.torch_device)
    given = [x.to(device.torch_device) for x in (a, bt, c)]
    kernel("primitives.cu", "product_s8")((1, 1, 1), (32, 1, 1), 1024, *given, out)
    require(torch.equal(out.cpu().long(), a.long() @ bt.long().T + c.long()), "a product of int8 differs")
    return {"error": 0.0}


def check_roundings(device: Device, fp16: int) -> dict[str, float]:
    """Round to the nearest, ties to even, at ties, infinities and the ends of the range: torch's bits."""
    dtype = torch.float16 if fp16 else torch.bfloat16
    steps = torch.arange(-40, 41) / 64 + 1  # neighbours of 1 and what lies halfway between them
    edges = torch.tensor([0.0, -0.0, 65504, 65519, 65520, 3.3e38, torch.inf, -torch.inf, 0.5, 1.5, 2.5, -2.5, 1e9])
    x = torch.cat((steps, steps / 128 + 1, edges, torch.randn(100) * 1000)).float()
    n, given = len(x), x.to(device.torch_device)
    bits = torch.zeros(n, 3, dtype=torch.int32, device=device.torch_device)
    back, integers = given.new_zeros(n, 2), bits.new_zeros(n)
    launched = kernel("primitives.cu", "roundings", IO_FP16=fp16)
    launched((-(-n // 64), 1, 1), (64, 1, 1), 0, given, bits, back, integers, n)
    low, high = _bits(x.to(dtype)), _bits((-x).to(dtype))
    wide = _bits(x.bfloat16()) | _bits((-x).bfloat16()) << 16
    expected = torch.stack((low, low | high << 16, wide), 1)
    require(torch.equal(bits.cpu().long() & 0xFFFFFFFF, expected), "a rounding differs")
    require(torch.equal(back.cpu(), torch.stack((x.to(dtype), (-x).to(dtype)), 1).float()), "a widening differs")
    require(torch.equal(integers.cpu().double(), x.double().round().clamp(-(2**31), 2**31 - 1)), "an integer differs")
    return {"error": 0.0}


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16).long() & 0xFFFF


def check_copies(device: Device) -> dict[str, float]:
    """Copy asynchronously, every second piece filled with zeros."""
    given = torch.arange(1, 129, dtype=torch.int32, device=device.torch_device)
    out = given.new_zeros(160)
    kernel("primitives.cu", "copies")((1, 1, 1), (32, 1, 1), 640, given, out)
    ok = torch.arange(32) % 2 == 0
    expected = torch.cat((given.cpu() * ok.repeat_interleave(4), given.cpu()[:32] * ok))
    require(torch.equal(out.cpu(), expected.int()), "what was copied, or left out, differs")
    return {"error": 0.0}


def check_approximations(device: Device) -> dict[str, float]:
    """Return the largest error of each approximate function over eight powers of ten."""
    magnitudes = torch.logspace(-6, 1.3, 500, dtype=torch.float64).float()
    x = torch.cat((magnitudes, -magnitudes))
    out = torch.zeros(len(x), len(APPROXIMATIONS), device=device.torch_device)
    launched = kernel("primitives.cu", "approximations")
    launched((-(-len(x) // 64), 1, 1), (64, 1, 1), 0, x.to(device.torch_device), out, len(x))
    errors: dict[str, float] = {}
    for (name, (exact, limit, absolute)), column in zip(APPROXIMATIONS.items(), out.cpu().double().T, strict=True):
        expected = exact(x.double().numpy())
        scale = np.maximum(np.abs(expected), 1) if absolute else np.abs(expected)
        errors[name] = float((np.abs(column.numpy() - expected) / scale).max())
        require(errors[name] <= limit, f"{name} is off by {errors[name]:.1e}, allowed {limit:.1e}")
    return {"error": max(errors.values()), **errors}
