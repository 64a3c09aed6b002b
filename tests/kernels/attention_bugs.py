"""One-line bugs of attention, each with the problem that must show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cuda_kernels.paged_attn import Tile
from tests.kernels.helpers import assert_close, simulate
from tools.kernel_lab.attention import Case, make

DECODE = Case(head_dim=64, kv_heads=2, group=7, sequences=((1, 130), (1, 17)), blocks=0)
WINDOW = Case(head_dim=64, kv_heads=1, group=7, sequences=((1, 200), (2, 90)), window=40, blocks=0)
SPLIT = Case(head_dim=64, kv_heads=1, group=7, sequences=((1, 260), (1, 200), (1, 10)), blocks=3)
LONG = Case(head_dim=64, kv_heads=1, group=7, sequences=((1, 350),), blocks=0)
SHORT = Case(head_dim=64, kv_heads=1, group=7, sequences=((1, 30), (1, 70), (1, 30), (1, 100)), blocks=1)
UNSEEN = Case(head_dim=64, kv_heads=1, group=7, sequences=((40, 100), (1, 9)), blocks=7)
MANY_PARTS = Case(head_dim=64, kv_heads=1, group=1, sequences=((1, 4200),), blocks=70)
PREFILL = Case(head_dim=64, kv_heads=1, group=2, sequences=((40, 140), (1, 0)), blocks=0)
NO_KEYS = Case(head_dim=64, kv_heads=1, group=16, sequences=((5, 20), (1, 0)), blocks=0)
ONE_STAGE = Case(head_dim=64, kv_heads=1, sequences=((1, 150),), blocks=0, tile=Tile(16, 64, 4, 1))
FP8 = Case(head_dim=64, kv_heads=1, sequences=((1, 100),), int8=True, fp8=True, blocks=0)
WIDE = Case(head_dim=64, kv_heads=1, group=3, sequences=((70, 90), (1, 0)), blocks=0, tile=Tile(128, 64, 1, 2, 32))
EIGHTY = Case(head_dim=80, kv_heads=1, sequences=((1, 130), (1, 70), (1, 20)), blocks=3)
INT8 = Case(head_dim=64, kv_heads=1, sequences=((1, 100),), int8=True, blocks=0)


class Bug(NamedTuple):
    """A replacement in an expanded source, and the check that must fail."""

    source: str
    old: str
    new: str
    check: Callable[[], None]


def attention(case: Case) -> Callable[[], None]:
    """Return a check of one attention problem."""

    def check() -> None:
        problem = make(case)
        (out,) = simulate(lambda: (problem.run(),))
        assert_close(out, problem.expect(), slack=4)

    return check


def paged(old: str, new: str, case: Case) -> Bug:
    """Return a bug of attention."""
    return Bug("paged_attn.cu", old, new, attention(case))


TILE_BARRIER = "__syncthreads();  // this tile is there for all, and all have left the tile before"
ATTENTION_BUGS = {
    "fp8: another bias": paged("#define NUMBER 0x1p-8f", "#define NUMBER 0x1p-7f", FP8),
    "fp8: a bit of the exponent lost": paged("0x3f803f80u", "0x1f801f80u", FP8),
    "fp8: signs of even bytes": paged("pair & 0x80008000u", "pair & 0x8000u", FP8),
    "no barrier before a tile": paged(TILE_BARRIER, "", DECODE),
    "copies not waited for": paged("? STAGES - 2 : 0)>()", "? STAGES - 1 : 0)>()", DECODE),
    "the tile in use is overwritten": paged("(stage ? stage - 1 : STAGES - 1) * STAGE", "stage * STAGE", LONG),
    "no barrier before a reload": paged(
        "__syncthreads();\n      load_tile(shared, c", "load_tile(shared, c", ONE_STAGE
    ),
    "no barrier before maxima": paged(
        "__syncthreads();\n#pragma unroll\n  for (int w = 0; w", "for (int w = 0; w", DECODE
    ),
    "no barrier before probabilities": paged(
        "pair[1]);\n    }\n  __syncthreads();", "pair[1]);\n    }", DECODE
    ),
    "queries overwrite results": paged(
        "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < 2 * FRAGMENTS; i++) {\n    const float sum",
        "#pragma unroll\n  for (int i = 0; i < 2 * FRAGMENTS; i++) {\n    const float sum", NO_KEYS,
    ),
    "mma: halves of a swapped": paged("{%4,%5,%6,%7}", "{%5,%4,%6,%7}", DECODE),
    "mma: halves of b swapped": paged("{%8,%9}", "{%9,%8}", DECODE),
    "cvt: halves swapped": paged('"f"(high), "f"(low)', '"f"(low), "f"(high)', PREFILL),
    "ldmatrix not transposed": paged('_transposed, ".trans")', '_transposed, "")', DECODE),
    "swizzle of writes differs": paged("LOADED + row, chunk) * 16;", "LOADED + row, chunk ^ 1) * 16;", DECODE),
    "wide: scores of the first rows": paged("a[f][i], b + 2 * i);", "a[0][i], b + 2 * i);", WIDE),
    "wide: probabilities of the first rows": paged("p[f][half], b);", "p[0][half], b);", WIDE),
    "wide: positions of the first rows": paged("mask.position[f][row]", "mask.position[0][row]", WIDE),
    "wide: sums of the first rows": paged("const float sum = l[i / 2][i % 2]", "const float sum = l[0][i % 2]", WIDE),
    "a neighbour's slot": paged("slot, row);", "slot, row ^ 1);", DECODE),
    "a token sees not itself": paged("key > position ||", "key >= position ||", DECODE),
    "a token sees the next": paged("high + 1, in.block", "high + 2, in.block", DECODE),
    "the window is one too wide": paged("key <= position - mask.window", "key < position - mask.window", WINDOW),
    "masks are skipped at the edge": paged("at + BN > mask.all_to", "at > mask.all_to", DECODE),
    "sums are not rescaled": paged("l[i] *= rescale;", "", DECODE),
    "maxima of half a row": paged(
        "top[i] = fmaxf(top[i], __shfl_xor_sync(FULL_WARP, top[i], 2));", "", Case(head_dim=64, kv_heads=1)
    ),
    "sums of half a row": paged("l[i] += __shfl_xor_sync(FULL_WARP, l[i], 2);", "", DECODE),
    "heads of the wrong group": paged("head + (first + r) % GQA", "head + (first + r) / GQA", PREFILL),
    "values of the first head": paged("in.v + (s64)kv_head * HEAD_DIM,", "in.v,", DECODE),
    "keys lost between blocks": paged("(total + gridDim.x - 1) / gridDim.x", "total / gridDim.x", SPLIT),
    "two parts in one place": paged("blockIdx.y) * 2 +", "blockIdx.y) +", SPLIT),
    "an unseen part is read": paged("if (weight == 0.f) continue;", "", UNSEEN),
    "parts joined unscaled": paged("+= x[p].x * weight", "+= x[p].x", SPLIT),
    "weights read before they are there": paged("__syncthreads();  // all rows have their weights", "", SPLIT),
    "more parts than are joined": paged("max(max(even, parts),", "max(even,", MANY_PARTS),
    "a context begins where the one before did": paged("start = at, sequence++", "sequence++", SHORT),
    "the next part is read too early": paged("__syncthreads();  // the next part is there for all", "", SPLIT),
    "a block begins with a neighbour's context": paged("until - own, found)", "until, found)", SPLIT),
    "tickets are not given back": paged("if (*last) *ticket = 0;", "", SPLIT),
    "80: the next key's beginning": paged("TILED == HEAD_DIM || chunk < HEAD_DIM * KV_BYTES / 16", "true", EIGHTY),
    "80: the next head's beginning": paged("(TILED == HEAD_DIM || chunk < HEAD_DIM / 8)", "true", EIGHTY),
    "80: results run over": paged("if (TILED != HEAD_DIM && chunk >= HEAD_DIM / 8) continue;", "", EIGHTY),
    "80: parts lie closer": paged("* BM + r) * TILED + d)", "* BM + r) * HEAD_DIM + d)", EIGHTY),
    "int8: no scale of keys": paged("x *= reinterpret_cast<const float*>(keys", "x *= 1.f + 0.f * (keys", INT8),
    "int8: keys' scales for values": paged("[BN + warp_n * KEYS", "[warp_n * KEYS", INT8),
    "int8: queries in plain order": paged("pair % 2 * 4 + pair % 8 / 2;", "pair % 8;", INT8),
    "int8: even and odd swapped": paged("p[f][half], even);", "p[f][half], odd);", INT8),
    "int8: biased wrongly": paged("8388736.f", "8388735.f", INT8),
}  # fmt: skip
