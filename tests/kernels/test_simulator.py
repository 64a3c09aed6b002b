"""The tester tested: every instruction against its definition, and every refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cuda_kernels import compile as compiling
from cuda_kernels.simulator import KernelFaultError, SimulatedLauncher, UnsupportedError
from cuda_kernels.simulator.machine import ORDERS

SOURCE = Path(__file__).with_name("primitives.cu").read_text()
HEADER = '#include "common.cuh"\n'
N, LANES = 200, 256


def built(source: str, arch: str = "compute_90", **defines: int) -> str:
    """Compile a test's own source on top of common.cuh."""
    return compiling.build_text(source.replace(HEADER, compiling.expand("common.cuh")), "test.cu", defines, arch).ptx


def run(ptx: str, entry: str, *args: object, threads: int = 32, blocks: int = 1, shared: int = 4096, order: int = 0,
        read_only: int = 0) -> None:  # fmt: skip
    """Launch a kernel whose first `read_only` arguments it may not write."""
    written = [i >= read_only for i in range(len(args))]
    SimulatedLauncher(order=order).launch_ptx(ptx, entry, (blocks, 1, 1), (threads, 1, 1), shared, args, written)


def snippet(body: str) -> str:
    """Compile a kernel `k(int* x, int n)` of this body."""
    return built(f'{HEADER}extern "C" __global__ void k(int* x, int n) {{ {body} }}')


def expected_integers(v: np.ndarray) -> np.ndarray:
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


def expected_floats(v: np.ndarray) -> np.ndarray:
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


@pytest.mark.parametrize("arch", ["compute_80", "compute_100"])
@pytest.mark.parametrize("order", ORDERS)
def test_primitives_match_their_definitions(arch: str, order: int) -> None:
    """Shuffles, votes, bit operations, division, atomics and divergent loops give what they are defined to give."""
    given = np.zeros(LANES, np.int64)
    given[:N] = np.random.default_rng(0).integers(0, 1000, N)
    out, floats = torch.zeros(LANES, 10, dtype=torch.int32), torch.zeros(LANES, 4)
    histogram = torch.zeros(9, dtype=torch.int32)
    args = (torch.from_numpy(given[:N].astype(np.int32)), out, floats, histogram, np.int32(N))
    run(built(SOURCE, arch), "primitives", *args, threads=128, blocks=2, order=order, read_only=1)
    np.testing.assert_array_equal(out.numpy().view(np.uint32), expected_integers(given))
    np.testing.assert_allclose(floats.numpy()[:, :3], expected_floats(given)[:, :3], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(floats.numpy()[:, 3], expected_floats(given)[:, 3], rtol=8e-3)
    assert histogram[:8].tolist() == np.bincount(given % 8, minlength=8).tolist()
    assert histogram[8] == given[given % 3 == 0].max()


@pytest.mark.parametrize("fp16", [0, 1])
def test_tensor_cores_multiply(fp16: int) -> None:
    """A product through cp.async, ldmatrix, its transpose and mma.sync is the product, to the last bit."""
    torch.manual_seed(0)
    dtype = torch.float16 if fp16 else torch.bfloat16
    a, b = torch.randint(-9, 9, (16, 16)).to(dtype), torch.randint(-9, 9, (16, 8)).to(dtype)
    out, out_t = torch.full((16, 8), torch.nan), torch.full((16, 8), torch.nan)
    run(built(SOURCE, IO_FP16=fp16), "product", a, b, b.T.contiguous(), out, out_t, read_only=3)
    assert torch.equal(out, a.float() @ b.float()) and torch.equal(out_t, out)


FAULTS = {
    "out of bounds": "x[n] = 1;",
    "misaligned": "*(u32*)((char*)x + 2) = n;",
    "outside every argument": "x[(s64)n << 38] = 1;",
    "outside the": "DYN_SMEM(int, s); s[1024 + threadIdx.x] = n; __syncthreads(); x[0] = s[n];",
    "never comes": "if (threadIdx.x < 5) x[0] = __shfl_xor_sync(FULL_WARP, n, 1);",
    "have left": "if (threadIdx.x >= 32) return; DYN_SMEM(int, s); s[n] = n; __syncthreads(); x[0] = s[n + 1];",
    "in flight": "DYN_SMEM(int, s); copy16_async(s, x, true); copies_commit();",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_raise(fault: str) -> None:
    """What a GPU forbids or leaves undefined raises and says which it was."""
    with pytest.raises(KernelFaultError, match=fault):
        run(snippet(FAULTS[fault]), "k", torch.zeros(8, dtype=torch.int32), np.int32(8), threads=64)


def test_const_arguments_cannot_be_written() -> None:
    """A kernel that writes through a pointer it declared const is caught."""
    with pytest.raises(KernelFaultError, match="const"):
        run(snippet("x[0] = n;"), "k", torch.zeros(8, dtype=torch.int32), np.int32(8), read_only=1)


def test_a_copy_is_not_there_before_it_is_waited_for() -> None:
    """The destination of an asynchronous copy reads as poison until its wait."""
    body = """DYN_SMEM(int, s); copy16_async(s, x, true); copies_commit(); int early = s[0]; copies_wait<0>();
              x[4] = early; x[5] = s[0];"""
    x = torch.arange(1, 9, dtype=torch.int32)
    run(snippet(body), "k", x, np.int32(0))
    assert x[4:6].tolist() == [-1, 1]


def test_orders_of_warps_expose_a_missing_barrier() -> None:
    """Without a barrier the result depends on which warp ran first."""
    body = "DYN_SMEM(int, s); s[threadIdx.x] = threadIdx.x; x[threadIdx.x] = s[63 - threadIdx.x];"
    results = []
    for order in ORDERS:
        x = torch.zeros(64, dtype=torch.int32)
        run(snippet(body), "k", x, np.int32(0), threads=64, order=order)
        results.append(x.tolist())
    assert results[0] == list(range(63, -1, -1)) and results[1] != results[0] and results[2] != results[1]


UNKNOWN = ["sin.approx.ftz.f32 %f1, %f2", "add.sat.f32 %f1, %f1, %f2", "cvt.rp.f32.f64 %f1, %fd1", "bar.sync 1",
           "ld.f32 %f1, [%rd1]", "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 3", "call foo", "ld.global.v8.f32 %f1, [%rd1]",
           "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1,%f1,%f1,%f1},{%r1,%r1,%r1,%r1},{%r1,%r1},"
           "{%f1,%f1,%f1,%f1}", "add.s32 %r1, %rd1, 3", "mul.hi.u64 %rd1, %rd1, %rd1",
           ".local .b8 depot[16]"]  # fmt: skip


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_instructions_are_refused(text: str) -> None:
    """An opcode, a modifier or a mismatch of widths that is not known raises instead of being guessed."""
    ptx = ".visible .entry k(.param .u64 a) { .reg .f32 %f<4>; .reg .f64 %fd<2>; .reg .b32 %r<4>; .reg .b64 %rd<4>;"
    with pytest.raises(UnsupportedError):
        run(f"{ptx} {text}; ret; }}", "k", None)
