"""Every way the kernels are compiled for the supported models, and what must be true of each: the compile gate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

import attrs

from cuda_kernels.compile import CompileError, Usage
from cuda_kernels.gemm_s8 import STAGES
from cuda_kernels.launch import Kernel, kernel
from cuda_kernels.paged_attn import HEAD_DIMS, Device, Tile, choose_tile, widened
from cuda_kernels.tuning import BY_ARCHITECTURE
from tools.ptx_simulator.program import parse

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
SHARED_BYTES = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KiB a block may ask for
# What must be in an entry point's PTX, and what ptxas makes of it: the tensor cores' HMMA, LDSM into fragments, LDGSTS
# past the registers, and 16 bytes a thread in LDG.128.
_MMA, _LDMATRIX = "mma.sync.aligned.m16n8k16.row.col.f32", "ldmatrix.sync.aligned.m8n8.x4"
_COPY16, _LOAD16, _LOAD16_CACHED = "cp.async.cg.shared.global", "ld.global.L1__no_allocate.v4", "ld.global.nc.v4"
NEEDED = {
    "paged_attention": (_MMA, _LDMATRIX + ".shared", _LDMATRIX + ".trans", _COPY16, _LOAD16, "st.global.v4"),
    "grouped_linear": (_MMA, _LDMATRIX, _COPY16),
    "gemm_s8": ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", _LDMATRIX, _COPY16),
    "gemm_w4": (_MMA, _LDMATRIX, _COPY16, "lop3"),
    "gemv": (_LOAD16, _LOAD16_CACHED),
    "rms_norm": (_LOAD16, "st.global.v4"),
    "add_rms_norm": (_LOAD16, "st.global.v4"),
    "act_and_mul": (_LOAD16, "st.global.v4"),
    "quantize_rows": (_LOAD16_CACHED,),
    "quantize_tokens": (_LOAD16_CACHED,),
    "read_all": (_LOAD16,),
}
KV_KINDS = ((0, 0), (1, 0), (1, 1))  # keys and values of 8 bits or not, and of e4m3
HEADS = ((64, 7), (80, 4), (96, 1), (128, 4), (128, 1), (256, 8), (512, 8))  # head size, query heads per key head


# Rows of a tile of 4-bit weights, gated or not, and stages; then what is added to numbers and whether scales are float.
W4 = ((8, 0, 4), (8, 1, 4), (16, 0, 4), (16, 1, 4), (32, 0, 4), (32, 1, 4), (64, 0, 4))
W4_SCALES = ((0, 0), (1, 0), (2, 0), (2, 1))
# Rows of a tile, int8 weights or not, stages, and whether blocks share the inputs: of experts, then of one weight.
_EXPERTS = ((16, 0, 4, (0,)), (64, 0, 3, (0,)), (16, 1, 8, (0,)), (64, 1, 4, (0,)))
# Rows, whether warps share the inputs, and int8 weights or not.
GEMVS = ((1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (2, 0, 0), (2, 1, 0), (8, 0, 0), (8, 0, 1))
GEMMS = (*_EXPERTS, (16, 1, 16, (0, 1)), (32, 1, 12, (0, 1)), (64, 1, 8, (0, 1)))


@attrs.frozen
class Made:
    """One entry point of one specialisation, as compiled for one architecture.

    Attributes:
        usage: Registers and spills; None for PTX alone.
        missing: Instructions of NEEDED that are not there.
    """

    kernel: Kernel
    entry: str
    arch: str
    usage: Usage | None
    missing: tuple[str, ...]

    @property
    def fault(self) -> str | None:
        """What is wrong; None where nothing is. No kernel is allowed to spill."""
        if self.usage and self.usage.spill_bytes:
            return f"spills {self.usage.spill_bytes} bytes at {self.usage.registers} registers"
        return f"lacks {', '.join(self.missing)}" if self.missing else None


def inspect(kernel: Kernel, arch: str) -> Iterator[Made]:
    """Compile a specialisation, or take it from the cache, and look at its entry points."""
    built = kernel.build(arch)
    entries = built.usage or {kernel.entry: None}
    if kernel.entry not in entries:
        raise CompileError(f"{kernel.source}: nothing is said of {kernel.entry}")
    for entry, usage in entries.items():
        there = Counter(".".join((i.opcode, *i.modifiers)) for i in parse(built.ptx, entry).instructions)
        missing = tuple(name for name in _needed(kernel, entry) if not any(one.startswith(name) for one in there))
        yield Made(kernel, entry, arch, usage, missing)


def _needed(kernel: Kernel, entry: str) -> tuple[str, ...]:
    """Return what an entry must have; one that joins splits writes its rows by pairs."""
    joins = ("SPLIT", 1) in kernel.defines
    return tuple(name for name in NEEDED.get(entry, ()) if not (joins and name.startswith("st.global.v4")))


def attention(arch: str) -> list[Kernel]:
    """Return the attention kernels that an architecture's shared memory leads to, full of blocks or not."""
    tuned = BY_ARCHITECTURE[divmod(int(arch.removeprefix("sm_")), 10)]
    device = Device(multiprocessors=100, shared_bytes=SHARED_BYTES[arch] * 1024, tuning=tuned)
    made: set[Kernel] = set()
    for heads, kind, rows in product(HEADS, KV_KINDS, (16, 64, 128)):
        int8 = bool(kind[0])
        tile = choose_tile(rows, heads[0], device, int8=int8)
        made.update(_of_tile(heads, kind, tile, device, (0, 1) if rows > tile.rows or rows == 128 else (1,)))
        if (wide := widened(tile, 1000, heads[0], device, int8=int8)) != tile:
            made.update(_of_tile(heads, kind, wide, device, (0,)))
    return sorted(made, key=str)


def _of_tile(
    heads: tuple[int, int], kind: tuple[int, int], tile: Tile, device: Device, splits: Sequence[int]
) -> Iterator[Kernel]:
    (head_dim, group), (int8, fp8) = heads, kind
    together = tile.blocks(head_dim, device, int8=bool(int8))
    full, empty = (tile.deepened(blocks, head_dim, device, int8=bool(int8)).stages for blocks in (together, 1))
    kinds = product(splits, ((full, 0), (empty, 0), (full, 1)), (0, 1) if head_dim == 128 else (0,))
    for split, (stages, masks), fp16 in kinds:
        yield kernel(
            "paged_attn.cu", "paged_attention", HEAD_DIM=head_dim, GQA=group, BM=tile.rows, BN=tile.keys,
            WARP_ROWS=tile.warp_rows, WARPS_N=tile.warps_n, STAGES=stages, BLOCKS=together, KV_8BIT=int8, KV_FP8=fp8,
            SPLIT=split, WINDOW=masks, SOFTCAP=masks, IO_FP16=fp16,
        )  # fmt: skip


def others() -> list[Kernel]:
    """Return the rest, for bfloat16 and float16."""
    flag = (0, 1)
    rows = ((64, 32), (896, 128), (4096, 512), (5376, 512), (16384, 512))
    return [
        *(kernel("norm.cu", "rms_norm", HIDDEN=h, THREADS=t, IO_FP16=fp16) for (h, t), fp16 in product(rows, flag)),
        *(kernel("act.cu", "act_and_mul", GELU=gelu, IO_FP16=fp16) for gelu, fp16 in product(flag, flag)),
        *(
            kernel("kv_write.cu", "kv_write", HEAD_DIM=head_dim, KV_8BIT=int8, KV_FP8=fp8, IO_FP16=fp16)
            for head_dim, (int8, fp8), fp16 in product(HEAD_DIMS, KV_KINDS, flag)
        ),
        *(
            kernel("gemv.cu", "gemv", M=m, SHARED=shared, INT8=int8, GATED=gated, GELU=0, NORM=norm, IO_FP16=fp16)
            for (m, shared, int8), gated, norm, fp16 in product(GEMVS, flag, flag, flag)
        ),
        *(
            kernel("moe.cu", entry, BM=rows, NUM_EXPERTS=128, TOP_K=8, IO_FP16=fp16)
            for entry, rows, fp16 in product(("route", "sort_pairs", "combine"), (16, 64), flag)
        ),
        *_gemms(),
        *_w4(),
        *(kernel("primitives.cu", "primitives", IO_FP16=fp16) for fp16 in flag),
        kernel("step.cu", "prepare_step"),
        *(
            kernel("quant.cu", entry, IO_FP16=fp16)
            for entry, fp16 in product(("quantize_rows", "quantize_tokens"), flag)
        ),
        *(kernel("sample.cu", entry, THREADS=512) for entry in ("likeliest", "draw", "token_logprobs")),
    ]


def _gemms() -> Iterator[Kernel]:
    flag = (0, 1)
    for (rows, int8, stages, splits), gated, fp16 in product(GEMMS, flag, flag):
        own = {"BM": rows, "INT8": int8, "GATED": gated, "GELU": 0, "STAGES": stages, "IO_FP16": fp16}
        yield from (kernel("gemm.cu", "grouped_linear", SPLIT=split, **own) for split in splits)
    for gated, split, fp16 in product(flag, flag, flag):
        yield kernel("gemm_s8.cu", "gemm_s8", GATED=gated, GELU=0, STAGES=STAGES, SPLIT=split, IO_FP16=fp16)


def _w4() -> Iterator[Kernel]:
    for (rows, gated, stages), (offset, wide), split, fp16 in product(W4, W4_SCALES, (0, 1), (0, 1)):
        yield kernel(
            "gemm_w4.cu", "gemm_w4", BM=rows, STAGES=stages, GATED=gated, GELU=0, OFFSET=offset, WIDE_SCALES=wide,
            SPLIT=split, IO_FP16=fp16,
        )  # fmt: skip
