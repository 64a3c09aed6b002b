"""Tests of the tests: each of these one-line bugs must be caught by running the kernel on the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from cuda_kernels import compile as compiling
from cuda_kernels import gemm, gemm_s8, gemm_w4, gemv, kv_write, moe, norm, quant, tickets
from tests.kernels.attention_bugs import ATTENTION_BUGS, Bug
from tests.kernels.helpers import assert_close, simulate
from tests.kernels.sample_bugs import SAMPLE_BUGS, check_draw
from tests.kernels.test_kv_write import assert_rounded_as_torch
from tools.kernel_lab.cases import all_checks, judge, round_tokens
from tools.ptx_simulator import KernelFaultError, UnsupportedError
from tools.ptx_simulator.machine import ORDERS
from trio_llm.model.ops.matrices import Blocks, Tiles
from trio_llm.model.ops.torch_reference import dequantize


def check_norm() -> None:
    """Normalise one row of 300 pieces by 128 threads."""
    x = torch.randn(2, 320).bfloat16()
    (out,) = simulate(lambda: (norm.rms_norm(x, x[0], 1e-6),))
    wide = x.double()
    assert_close(out, wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * wide[0])


def check_kv_write(head_dim: int = 64) -> None:
    """Write int8 keys and values of three tokens, one of them padding."""
    qkv, angles = torch.randn(3, 4 * head_dim).bfloat16(), torch.randn(3, head_dim // 2)
    slots = torch.tensor([2, -1, 0])

    def run() -> tuple[Tensor, ...]:
        k, v = torch.zeros(2, 4, 1, head_dim, dtype=torch.int8)
        scales = torch.zeros(2, 4, 1)
        cos, sin = angles.cos(), angles.sin()
        args = (qkv, cos, sin, slots, k, v, *scales)
        return kv_write.write_kv(*args, num_heads=2, qk_norm=None, v_norm=True, eps=1e-6), k, v, scales

    q, k, v, scales = simulate(run)
    heads = qkv.double().view(3, 4, head_dim)
    first, second = heads[:, :3].chunk(2, dim=-1)
    c, s = angles.double().cos()[:, None], angles.double().sin()[:, None]
    turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    assert_close(q, turned[:, :2])
    value = heads[:, 3:] * (heads[:, 3:].pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    for token, slot in ((0, 2), (2, 0)):
        for cache, scale, wanted in ((k, scales[0], turned[token, 2]), (v, scales[1], value[token, 0])):
            torch.testing.assert_close(scale[slot, 0].double(), wanted.abs().max() / 127, rtol=1e-5, atol=0)
            assert (cache[slot, 0] * scale[slot, 0].double() - wanted).abs().max() <= scale[slot, 0] * 0.501


check_kv_write_80 = partial(check_kv_write, head_dim=80)


def check_step() -> None:
    """Prepare a step of three rows, two KV groups and one rope."""
    (check,) = all_checks(torch.device("cpu"), small=True, sources={"step.cu"})
    assert judge(check, simulate(check.run))["error"] < 2e-7


def check_gemv(rows: int = 1) -> None:
    """Multiply rows by seven int8 outputs of 272 inputs, gated."""
    x, weight = torch.randn(rows, 272).bfloat16(), torch.randint(-127, 128, (14, 272), dtype=torch.int8)
    scale = (torch.rand(14) / 100).bfloat16()
    (out,) = simulate(lambda: (gemv.linear(x, weight, scale=scale, activation="silu"),))
    gate, up = (x.double() @ weight.double().T * scale.double()).chunk(2, dim=-1)
    assert_close(out, torch.nn.functional.silu(gate) * up, slack=2)


check_gemv_of_rows = partial(check_gemv, rows=5)


def check_shared_gemv() -> None:
    """Multiply one row by four outputs of 2,320 inputs, which the warps of a block share; the third has the rest."""
    x, weight = torch.randn(1, 2320).bfloat16(), (torch.randn(4, 2320) / 8).bfloat16()
    (out,) = simulate(lambda: (gemv.linear(x, weight),))
    assert_close(out, x.double() @ weight.double().T, slack=2)


def check_normed_gemv() -> None:
    """Multiply two sums of 1,040 inputs, normalised, by nine outputs: two blocks, rows longer than a block's piece."""
    x, residual, norm = torch.randn(2, 1040).bfloat16(), torch.randn(2, 1040).bfloat16(), torch.rand(1040).bfloat16()
    weight = (torch.randn(9, 1040) / 8).bfloat16()
    out, total = simulate(lambda: gemv.normed_linear(x, residual, norm, 1e-6, weight))
    assert torch.equal(total, x + residual)
    wide = total.double()
    normed = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.double()
    assert_close(out, normed @ weight.double().T, slack=2, of_largest=2**-8)


def check_fp8_write() -> None:
    """Write all e4m3 numbers, those half-way between and their neighbours, as torch rounds them."""
    assert_rounded_as_torch()


def check_gemm() -> None:
    """Multiply twenty rows by gated int8 weights, more steps than stages, and a last tile that is not full."""
    x, weight = torch.randn(20, 1024).bfloat16(), torch.randint(-127, 128, (72, 1024), dtype=torch.int8)
    scale, bias = (torch.rand(72) / 100).bfloat16(), torch.randn(72).bfloat16()
    (out,) = simulate(lambda: (gemm.linear(x, weight, scale, bias=bias, activation="silu", splits=1),))
    gate, up = (x.double() @ weight.double().T * scale.double() + bias.double()).chunk(2, dim=-1)
    assert_close(out, torch.nn.functional.silu(gate) * up, slack=2)


def check_split_gemm() -> None:
    """Multiply nine rows by int8 weights, three blocks sharing the inputs of a tile."""
    x, weight = torch.randn(9, 320).bfloat16(), torch.randint(-127, 128, (68, 320), dtype=torch.int8)
    scale = (torch.rand(68) / 100).bfloat16()
    (out,) = simulate(lambda: (gemm.linear(x, weight, scale, splits=3),))
    assert_close(out, x.double() @ weight.double().T * scale.double(), slack=2)


def check_s8(splits: int = 1) -> None:
    """Multiply seventy rows of int8 by gated int8 weights, more steps than stages, the last tile not full."""
    x, weight = (torch.randint(-127, 128, (rows, 320), dtype=torch.int8) for rows in (70, 144))
    x_scale, scale = torch.rand(70) / 100, (torch.rand(144) / 100).bfloat16()
    bias = torch.randn(144).bfloat16()
    run = partial(gemm_s8.linear, x, x_scale, weight, scale, bias=bias, activation="silu", splits=splits)
    (out,) = simulate(lambda: (run(),))
    products = x.double() @ weight.double().T * x_scale.double()[:, None] * scale.double() + bias.double()
    gate, up = products.chunk(2, dim=-1)
    assert_close(out, torch.nn.functional.silu(gate) * up, slack=2)


check_split_s8 = partial(check_s8, splits=3)


def check_tokens() -> None:
    """Round three tokens of 2,056 entries, one of them with a NaN."""
    x = torch.randn(3, 2056).bfloat16()
    x[1, 1111], x[2, 7] = torch.nan, -9
    numbers, scale = simulate(lambda: quant.quantize_tokens(x))
    assert scale.isnan().tolist() == [False, True, False]
    for got, expected in zip((numbers[::2], scale[::2]), round_tokens(x[::2]), strict=True):
        assert torch.equal(got, expected)


def check_w4() -> None:
    """Multiply 9 rows by gated 4-bit weights of minima, a part of the inputs by each of two blocks."""
    x, minimum = torch.randn(9, 288).bfloat16(), torch.randn(192, 3) / 10
    matrix = Blocks(torch.randint(0, 256, (192, 144), dtype=torch.uint8), torch.rand(192, 3) / 50, minimum=minimum)
    bias, tiles = torch.randn(192).bfloat16(), Tiles.of(matrix)
    run = partial(gemm_w4.linear, x, tiles.weight, tiles.scale, minima=tiles.minimum, bias=bias, splits=2)
    (out,) = simulate(lambda: (run(activation="silu"),))
    gate, up = (x.double() @ dequantize(matrix).double().T + bias).chunk(2, dim=-1)
    assert_close(out, torch.nn.functional.silu(gate) * up, slack=2)


def check_w4_zeros() -> None:
    """Multiply one row by 4-bit weights of zero points, six stages by one block."""
    x, zero = torch.randn(1, 736).half(), torch.randint(0, 16, (32, 23), dtype=torch.int8)
    matrix = Blocks(torch.randint(0, 256, (32, 368), dtype=torch.uint8), (torch.rand(32, 23) / 50).half(), zero=zero)
    tiles = Tiles.of(matrix)
    (out,) = simulate(lambda: (gemm_w4.linear(x, tiles.weight, tiles.scale, zeros=tiles.zero, splits=1),))
    assert_close(out, x.double() @ dequantize(matrix).double().T, slack=2)


def check_padding() -> None:
    """Give five tokens to experts of 16-bit weights; the last only pads the batch."""
    x, ids = torch.randn(5, 64).bfloat16(), torch.tensor([[0, 2], [2, 1], [0, 1], [1, 2], [-1, -1]])
    x[4] = torch.nan
    gate_up, down = (torch.randn(3, 128, 64) / 8).bfloat16(), (torch.randn(3, 64, 64) / 8).bfloat16()
    weights, load = torch.full((5, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    (out,) = simulate(lambda: (moe.moe(x, weights, ids, gate_up, down, load, "silu")[:4],))
    assert load.tolist() == [2 * len(ORDERS), 3 * len(ORDERS), 3 * len(ORDERS)]
    for token in range(4):
        parts = [gate_up[e].double() @ x[token].double() for e in ids[token]]
        hidden = [torch.nn.functional.silu(part[:64]) * part[64:] for part in parts]
        wanted = sum(0.5 * down[e].double() @ h for e, h in zip(ids[token], hidden, strict=True))
        assert_close(out[token], torch.as_tensor(wanted), slack=12)


def rows(old: str, new: str) -> Bug:
    """Return a bug of products of more rows than two."""
    return Bug("gemv.cu", old, new, check_gemv_of_rows)


OF_ALL_WARPS = "  largest = warp_max(scratch[threadIdx.x % (THREADS / 32)]);\n  const"
BUGS = ATTENTION_BUGS | SAMPLE_BUGS | {
    "no barrier before a sum is read": Bug(
        "norm.cu", "= v;\n  __syncthreads();\n  float total", "= v;\n  float total", check_norm
    ),
    "a warp's sum in a neighbour's place": Bug(
        "norm.cu", "scratch[threadIdx.x / 32] = v", "scratch[threadIdx.x / 64] = v", check_norm
    ),
    "no end of the row": Bug("norm.cu", "if (at < HIDDEN) v = load16", "v = load16", check_norm),
    "half a warp summed": Bug("norm.cu", "int offset = 16; offset > 0", "int offset = 8; offset > 0", check_norm),
    "rotated the other way": Bug("kv_write.cu", "cos[i] - second", "cos[i] + second", check_kv_write),
    "padding is written": Bug("kv_write.cu", "if (slot < 0) return;", "", check_kv_write),
    "a scale of 128": Bug("kv_write.cu", "LARGEST 127.f", "LARGEST 128.f", check_kv_write),
    "keys where values belong": Bug("kv_write.cu", "write(v_cache + at, v_", "write(k_cache + at, k_", check_kv_write),
    "80: lanes without any count": Bug("kv_write.cu", "= holds ? x[i / N][i % N] : 0.f", "*= 1.f", check_kv_write_80),
    "80: lanes without any write": Bug("kv_write.cu", "if (!holds) return;", "", check_kv_write_80),
    "values are rotated": Bug("kv_write.cu", "if (!is_value) {", "if (true) {", check_kv_write),
    "a slot is its block's first": Bug("step.cu", " + position % block_size;", ";", check_step),
    "a context without its last token": Bug("step.cu", "(int)position + 1", "(int)position", check_step),
    "no row pads": Bug("step.cu", "row == padding_row", "false", check_step),
    "angles forget a quarter turn": Bug("step.cu", "if (quarters & 1)", "if (false)", check_step),
    "an angle of few digits": Bug("step.cu", "x = __fmaf_rn(turns, 3.13916473e-7f, x);", "", check_step),
    "a row is read before it is there": Bug(
        "gemv.cu", "__syncthreads();  // the row is there for all, and the sums have been read", "", check_normed_gemv
    ),
    "the sum is written by a block that may not be": Bug(
        "gemv.cu", "if (blockIdx.x == 0) *", "if (blockIdx.x == 8) *", check_normed_gemv
    ),
    "a norm of the input alone": Bug("gemv.cu", "m * k + at) = v;", "m * k + at) = load16(x + at);", check_normed_gemv),
    "half of the squares": Bug(
        "gemv.cu", "squares += io_low(v.x[i]) * io_low(v.x[i]) +", "squares +=", check_normed_gemv
    ),
    "a product that waits for no kernel": Bug("gemv.cu", "  wait_for_kernels_before();\n", "", check_gemv),
    "a norm that waits for no kernel": Bug("norm.cu", "  wait_for_kernels_before();\n", "", check_norm),
    "heads past the end wait for no kernel": Bug(
        "kv_write.cu", "  wait_for_kernels_before();\n", "  if (threadIdx.x < 128) wait_for_kernels_before();\n",
        check_kv_write,
    ),
    "an output past the end": Bug("gemv.cu", "|| output >= n) return", ") return", check_gemv),
    "weights past the end": Bug("gemv.cu", "if (rest) {", "if (true) {", check_gemv),
    "the gate's scale for both": Bug("gemv.cu", "scales[output + half * n])", "scales[output])", check_gemv),
    "shared: no barrier before the parts are added": Bug(
        "gemv.cu", "__syncthreads();  // the parts of the row are there", "", check_shared_gemv
    ),
    "shared: a part is left out": Bug(
        "gemv.cu", "w = 0; w < WARPS; w++) mine", "w = 1; w < WARPS; w++) mine", check_shared_gemv
    ),
    "shared: the rest for all": Bug("gemv.cu", "own_step == whole % SHARERS && ", "", check_shared_gemv),
    "shared: a step too few": Bug("gemv.cu", "- own_step + SHARERS - 1)", "- own_step)", check_shared_gemv),
    "rows: no barrier before the parts are added": rows("__syncthreads();  // the parts of all warps are there", ""),
    "rows: a part is left out": rows("for (int w = 0; w < WARPS; w++) sum", "for (int w = 1; w < WARPS; w++) sum"),
    "rows: weights past the end": rows("ok ? load16(weights[i] + at)", "true ? load16(weights[i] + at)"),
    "rows: inputs past the end": rows("ok ? *reinterpret_cast<const", "true ? *reinterpret_cast<const"),
    "rows: gates for what they gate": rows("+ i * n : min(", ": min("),
    "rows: the neighbour's row": rows("2 + row % 2]", "2 + (row + 1) % 2]"),
    "rows: bytes of another row": rows("a[i + 2] = pack_io(wide[2]", "a[3 - i] = pack_io(wide[2]"),
    "rows: an output past the end": rows("row >= rows || output >= n) return", "row >= rows) return"),
    "rows: wait for no kernel": rows("  wait_for_kernels_before();\n", ""),
    "no barrier before a stage": Bug(
        "gemm.cu", "__syncthreads();  // this stage is there for all, and all have left the one before", "", check_gemm
    ),
    "a stage not waited for": Bug("gemm.cu", "copies_wait<STAGES - 2>()", "copies_wait<STAGES - 1>()", check_gemm),
    "the stage in use is loaded": Bug("gemm.cu", "(stage ? stage - 1 : STAGES - 1)", "stage", check_gemm),
    "x in another order": Bug("gemm.cu", "{low.x, high.x, low.y,", "{low.x, low.y, high.x,", check_gemm),
    "x of the neighbour's bytes": Bug("gemm.cu", "offset = t % 2 * 8", "offset = (t + 1) % 2 * 8", check_gemm),
    "bytes swapped on widening": Bug("gemm.cu", "pack_io(wide[0], wide[1])", "pack_io(wide[1], wide[0])", check_gemm),
    "up without its bias": Bug("gemm.cu", "scales, bias, n + output)", "scales, nullptr, n + output)", check_gemm),
    "rows past the end": Bug("gemm.cu", ": at < num_rows ? at : -1", ": at", check_gemm),
    "columns past the end": Bug("gemm.cu", "if (column >= n) continue;", "", check_gemm),
    "inputs of the first part for all": Bug("gemm.cu", "own_pieces(x + begin * BK,", "own_pieces(x,", check_split_gemm),
    "parts of a sum that are left out": Bug("gemm.cu", "s < splits; s++", "s < 2; s++", check_split_gemm),
    "a product's tickets are not given back": Bug("gemm.cu", "if (*last) *ticket = 0;", "", check_split_gemm),
    "pairs for tokens": Bug("gemm.cu", "order && GATED ? row / top_k", "false ? row / top_k", check_padding),
    "s8: no barrier before a stage": Bug(
        "gemm_s8.cu", "__syncthreads();  // this stage is there for all, and all have left the one before", "", check_s8
    ),
    "s8: a stage not waited for": Bug("gemm_s8.cu", "copies_wait<STAGES - 2>()", "copies_wait<STAGES - 1>()", check_s8),
    "s8: the stage in use is loaded": Bug("gemm_s8.cu", "(stage ? stage - 1 : STAGES - 1)", "stage", check_s8),
    "s8: halves of a swapped": Bug("gemm_s8.cu", "{%4,%5,%6,%7}", "{%5,%4,%6,%7}", check_s8),
    "s8: inputs of the other half": Bug("gemm_s8.cu", "(x_at ^ part * 32)", "(x_at ^ 32 - part * 32)", check_s8),
    "s8: weights of the neighbour": Bug("gemm_s8.cu", "a[m], b + 2)", "a[m], b)", check_s8),
    "s8: the gate for both": Bug("gemm_s8.cu", "j + NTILES / 2 * GATED", "j", check_s8),
    "s8: up with the gate's scale": Bug("gemm_s8.cu", "scales, bias, n + output)", "scales, bias, output)", check_s8),
    "s8: the scale of another row": Bug("gemm_s8.cu", "x_scales[row];\n        *", "x_scales[0];\n        *", check_s8),
    "s8: rows past the end": Bug("gemm_s8.cu", "if (row >= num_rows) continue;", "", check_s8),
    "s8: columns past the end": Bug("gemm_s8.cu", "if (column >= n) continue;", "", check_s8),
    "s8: rows that are not there are read": Bug("gemm_s8.cu", "ok = i * 32 < own.rows_left", "ok = true", check_s8),
    "s8: inputs of the first part": Bug("gemm_s8.cu", "own_pieces(x + begin * BK,", "own_pieces(x,", check_split_s8),
    "s8: parts of a sum that are left out": Bug("gemm_s8.cu", "s < splits; s++", "s < 2; s++", check_split_s8),
    "s8: tickets are not given back": Bug("gemm_s8.cu", "if (*last) *ticket = 0;", "", check_split_s8),
    "tokens: a NaN is the least": Bug("quant.cu", "v.x[i] >> 16 & 0x7fffu", "v.x[i] >> 16 & 0x7f7fu", check_tokens),
    "tokens: signs count": Bug("quant.cu", "max(v.x[i] & 0x7fffu,", "max(v.x[i] & 0xffffu,", check_tokens),
    "tokens: no barrier": Bug(
        "quant.cu", f"= largest;\n  __syncthreads();\n{OF_ALL_WARPS}", f"= largest;\n{OF_ALL_WARPS}", check_tokens
    ),
    "tokens: the scale of a warp": Bug("quant.cu", OF_ALL_WARPS, "  const", check_tokens),
    "w4: no barrier before a stage": Bug(
        "gemm_w4.cu", "__syncthreads();  // this stage is there for all, and all have left the one before", "", check_w4
    ),
    "w4: a stage not waited for": Bug(
        "gemm_w4.cu", "copies_wait<STAGES - 2>()", "copies_wait<STAGES - 1>()", check_w4_zeros
    ),
    "w4: the stage in use is loaded": Bug(
        "gemm_w4.cu", "shared + (ahead - first) %", "shared + (step - first) %", check_w4_zeros
    ),
    "w4: waits for no kernel": Bug("gemm_w4.cu", "  wait_for_kernels_before();\n", "", check_w4),
    "w4: scales of another group early": Bug("gemm_w4.cu", "EARLY const scale_t*", "const scale_t*", check_w4),
    "w4: numbers in another order": Bug("gemm_w4.cu", "a[p * 2 + i / 2][i % 2]", "a[p * 2 + i % 2][i / 2]", check_w4),
    "w4: a bit too high": Bug("gemm_w4.cu", "#define BIT 3", "#define BIT 4", check_w4),
    "w4: the neighbour's zero point": Bug("gemm_w4.cu", "(16.f + zeros[i])", "(16.f + zeros[i ^ 1])", check_w4_zeros),
    "w4: no minimum": Bug("gemm_w4.cu", "offset[i] -= 16.f * scale[i]", "offset[i] = -16.f * scale[i]", check_w4),
    "w4: sums of the other row": Bug("gemm_w4.cu", "sums[i % 2]", "sums[i / 2]", check_w4),
    "w4: a group too late": Bug("gemm_w4.cu", "* of_group - tile;", "* of_group - tile + 1;", check_w4),
    "w4: the first group for all parts": Bug("gemm_w4.cu", "at = first * TILES / of_group", "at = 0", check_w4),
    "w4: the gate's bias for both": Bug("gemm_w4.cu", "bias[output + p * n]", "bias[output]", check_w4),
    "w4: parts that are not joined": Bug("gemm_w4.cu", "s < splits; s++", "s < 1; s++", check_w4),
    "w4: tickets are not given back": Bug("gemm_w4.cu", "if (*last) *ticket = 0;", "", check_w4),
    "w4: rows past the end": Bug("gemm_w4.cu", "if (row >= rows || output >= n)", "if (output >= n)", check_w4),
    "fp8: rounded up": Bug("kv_write.cu", "0x7ffffu + (magnitude >> 20 & 1u)", "0x80000u", check_fp8_write),
    "fp8: no subnormal numbers": Bug("kv_write.cu", "magnitude < 0x3c800000u", "magnitude == 0u", check_fp8_write),
    "padding counts": Bug("moe.cu", "held[j] == expert_of(warp, i)));", "held[j] <= i * 32 + warp));", check_padding),
}  # fmt: skip
MANY_BUGS = ("paged_attn.cu", "gemm.cu", "gemm_s8.cu", "gemm_w4.cu")
DEFAULT = [
    name for name, bug in BUGS.items() if bug.source not in MANY_BUGS and bug.check is not check_draw
] + [
    "no barrier before probabilities", "mma: halves of b swapped", "a token sees the next",
    "tickets are not given back", "no barrier before a stage", "x in another order", "pairs for tokens",
    "int8: queries in plain order", "fp8: another bias", "w4: no barrier before a stage", "w4: a group too late",
    "w4: tickets are not given back", "s8: no barrier before a stage", "s8: halves of a swapped",
    "draw: a histogram is not cleared", "draw: tickets are not given back", "draw: a bucket is kept whole",
    "draw: no barrier before buckets are added up",
]  # fmt: skip


def assert_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the source with the bug and see its check fail."""
    expand = compiling.expand
    text = expand(bug.source)
    assert bug.old in text, "the source has changed: seed the bug anew"
    torch.manual_seed(1)
    bad = text.replace(bug.old, bug.new)
    monkeypatch.setattr(compiling, "expand", lambda name: bad if name == bug.source else expand(name))
    with pytest.raises((AssertionError, ArithmeticError, KernelFaultError, UnsupportedError)):
        bug.check()


def test_there_are_enough_bugs() -> None:
    """At least 25, and none does nothing."""
    assert len(BUGS) >= 25 and all(bug.old != bug.new for bug in BUGS.values())


@pytest.fixture(autouse=True)
def own_tickets() -> Iterator[None]:
    """Leave no tickets to others that a bug did not give back."""
    yield
    tickets.make_tickets.cache_clear()


@pytest.mark.parametrize("name", DEFAULT)
def test_bugs_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of them, in every run."""
    assert_caught(BUGS[name], monkeypatch)


@pytest.mark.kernels_full
@pytest.mark.parametrize("name", [name for name in BUGS if name not in DEFAULT])
def test_all_bugs_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest."""
    assert_caught(BUGS[name], monkeypatch)


@pytest.mark.kernels_full
@pytest.mark.parametrize("check", list(dict.fromkeys(bug.check for bug in BUGS.values())))
def test_without_a_bug_the_checks_pass(check: Callable[[], None]) -> None:
    """What the bugs fail is passed by the sources as they are."""
    torch.manual_seed(1)
    check()
