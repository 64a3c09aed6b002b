"""The tester tested: every instruction against its definition, and every refusal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cuda_kernels import compile as compiling
from cuda_kernels import norm, sample
from cuda_kernels.launch import using
from tools.kernel_lab import primitives
from tools.kernel_lab.device import Simulated
from tools.ptx_simulator import KernelFaultError, SimulatedLauncher, UnsupportedError
from tools.ptx_simulator.machine import ORDERS

HEADER = '#include "common.cuh"\n'


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


@pytest.mark.parametrize("arch", ["compute_80", "compute_100"])
@pytest.mark.parametrize("order", ORDERS)
def test_primitives_match_their_definitions(arch: str, order: int) -> None:
    """Shuffles, votes, bit operations, division, atomics and divergent loops give what they are defined to give."""
    with using(SimulatedLauncher(arch, order)):
        primitives.check_primitives(Simulated())


@pytest.mark.parametrize("arch", ["compute_90", "compute_100"])
def test_halves_of_a_register_are_read(arch: str) -> None:
    """Upper halves of 32 and 64 bits are taken out, which newer targets spell as a scope of its own."""
    torch.manual_seed(3)
    x = torch.randn(2, 64).half()
    logits, hashes = torch.randn(2, 100), torch.arange(100, dtype=torch.int32)
    with using(SimulatedLauncher(arch)):
        out = norm.rms_norm(x, None, 1e-6)
        ids = sample.sample(logits, None, None, hashes)
    expected = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(ids, logits.argmax(-1))


@pytest.mark.parametrize("check", dict(primitives.checks(Simulated())).items(), ids=lambda item: item[0])
def test_each_instruction_gives_its_definition(check: tuple[str, Callable[[], object]]) -> None:
    """Conversions, copies, tensor cores and approximations are the same functions that a GPU is asked for."""
    with Simulated().session():
        check[1]()


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
