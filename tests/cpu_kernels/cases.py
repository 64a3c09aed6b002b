"""Checks of each CPU kernel against float64: poisoned outputs, unused slots full of NaN, odd sizes, strides.

`python -m tests.cpu_kernels.cases FLAGS` builds the kernels with further flags and runs every check, for sanitizers.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from cpu_kernels import act, attention, kv_write, library, linear, logprobs, moe, norm, sample, step
from cpu_kernels import compile as compiling
from cpu_kernels.blocks import Kind
from tests.cpu_kernels import block_cases, logits_cases

ROUNDING = {torch.float32: 2**-19, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = tuple(ROUNDING)
INT8_MAX = 127
LONG = 40, 2100  # more inputs than are widened at a time
MANY = 8, 30, 210  # rows of a few tiles, of many, and of more than pass a panel at a time


@contextmanager
def poisoned() -> Generator[None]:
    """Fill what kernels are to write with NaN first, or with a large number."""

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan if dtype.is_floating_point else 99, dtype=dtype)

    with contextlib.ExitStack() as stack:
        for module in (act, attention, kv_write, linear, logprobs, moe, norm, sample, step):
            stack.enter_context(mock.patch.object(module, "empty", empty))
        yield


def close(actual: Tensor, expected: Tensor, slack: float = 1.0) -> None:
    """Compare with float64 within the rounding of the dtype; both must be finite."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = ROUNDING[actual.dtype] * slack
    error = (actual.double() - expected).abs()
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps + 2**-40
    allowed = scale * (expected.abs() + expected.abs().max() / 4) + smallest
    assert bool((error <= allowed).all()), f"{float((error - allowed).max()):.3g} too far"


def activation(x: Tensor, kind: str) -> Tensor:
    """Return the activation in x's dtype."""
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh")


def check_linear() -> None:
    """Multiply by weights of every dtype, rows from one to more than two tiles, sizes that fill no panel."""
    sizes = itertools.product((1, 2, 3, 5, 8, 13, 31), ((1, 7), (33, 64), (100, 129)))
    for dtype, (rows, (outputs, inputs)) in itertools.product(DTYPES, (*sizes, *((rows, LONG) for rows in MANY))):
        wide = torch.randn(rows, inputs + 3).to(dtype)
        x, weight, bias = wide[:, :inputs], torch.randn(outputs, inputs).to(dtype), torch.randn(outputs)
        got = linear.linear(x, linear.pack(weight), (outputs, inputs), dtype, bias=bias)
        close(got, x.double() @ weight.double().T + bias.double(), 4)
        wider = torch.full((rows, outputs), torch.nan)
        linear.linear(x, linear.pack(weight), (outputs, inputs), dtype, bias=bias, out=wider)
        assert torch.equal(wider, got.float())  # rounded all the same


def check_gated() -> None:
    """Scale by a gate whose half ends in the middle of a panel, or at its end."""
    sizes = (
        *itertools.product((4,), (5, 32, 100)),
        *itertools.product((1, 30, 210), (810, 32)),
    )  # panels of several groups
    for dtype, (rows, width), kind in itertools.product(DTYPES, sizes, ("silu", "gelu_tanh")):
        x, weight = torch.randn(rows, 40).to(dtype), (torch.randn(2 * width, 40) / 6).to(dtype)
        bias = torch.randn(2 * width)
        got = linear.linear(x, linear.pack(weight), (2 * width, 40), dtype, bias=bias, activation=kind)  # type: ignore[arg-type]
        gate, up = (x.double() @ weight.double().T + bias.double()).chunk(2, dim=-1)
        close(got, activation(gate, kind) * up, 4)


def check_int8() -> None:
    """Multiply by INT8 weights: exactly, as far as the activations are whole numbers; else within their rounding."""
    sizes = itertools.product((1, 2, 3, 7, 14), ((3, 5), (40, 96), (129, 100)))
    for rows, (outputs, inputs) in (*sizes, *((rows, LONG) for rows in MANY)):
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        weight[0] = -127
        scale, bias = torch.rand(outputs) / 100, torch.randn(outputs)
        packed = linear.pack(weight)
        whole = torch.randint(-127, 128, (rows, inputs)).float()
        whole[:, ::32] = 127  # so the scale of every block is one
        exact = whole.double() @ (weight.double() * scale.double()[:, None]).T + bias.double()
        close(linear.linear(whole, packed, (outputs, inputs), torch.int8, scale=scale, bias=bias), exact, 2)
        x = torch.randn(rows, inputs)
        got = linear.linear(x, packed, (outputs, inputs), torch.int8, scale=scale, bias=bias)
        most = F.pad(x, (0, -inputs % 32)).view(rows, -1, 32).abs().amax(-1).repeat_interleave(32, 1)[:, :inputs]
        wanted = x.double() @ (weight.double() * scale.double()[:, None]).T + bias.double()
        # An activation is rounded by at most half of a 127th of its block's largest.
        bound = (most.double() / 254) @ (weight.double() * scale.double()[:, None]).abs().T
        assert bool(((got.double() - wanted).abs() <= 1.01 * bound + 1e-5).all())


def check_int8_exact() -> None:
    """Multiply INT8 weights by activations as they are: exactly, up to the rounding of the result."""
    sizes = itertools.product((1, 2, 3, 7, 14), ((3, 5), (40, 96), (129, 100)))
    for dtype, (rows, (outputs, inputs)) in itertools.product(DTYPES, (*sizes, *((rows, LONG) for rows in MANY))):
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        scale, bias, x = torch.rand(outputs) / 100, torch.randn(outputs), torch.randn(rows, inputs).to(dtype)
        packed = linear.pack(weight, "int8_exact")
        got = linear.linear(x, packed, (outputs, inputs), "int8_exact", scale=scale, bias=bias)
        close(got, x.double() @ (weight.double() * scale.double()[:, None]).T + bias.double(), 4)
    whole = torch.randint(-127, 128, (70, 33), dtype=torch.int8)
    packed, ids, scale = linear.pack(whole, "int8_exact"), torch.tensor([0, 69, 31]), torch.rand(70) / 100
    got = linear.embed(ids, packed, (70, 33), "int8_exact", scale, torch.float32)
    assert torch.equal(got, (whole.float() * scale[:, None])[ids])


def check_embedding() -> None:
    """Read rows back out of panels."""
    ids = torch.tensor([[0, 32], [69, 31]])
    for dtype in DTYPES:
        weight = torch.randn(70, 33).to(dtype)
        assert torch.equal(linear.embed(ids, linear.pack(weight), (70, 33), dtype, None, dtype), weight[ids])
        whole, scale = torch.randint(-127, 128, (70, 33), dtype=torch.int8), torch.rand(70) / 100
        got = linear.embed(ids, linear.pack(whole), (70, 33), torch.int8, scale, dtype)
        assert torch.equal(got, (whole.float() * scale[:, None])[ids].to(dtype))
        beyond = linear.embed(torch.tensor([70, -1, 2**40]), linear.pack(weight), (70, 33), dtype, None, dtype)
        assert bool(beyond.isnan().all())


def check_norm() -> None:
    """Normalise rows of any width, strided, with and without weight and addition."""
    for dtype, width in itertools.product(DTYPES, (2, 16, 75, 576)):
        x, residual = torch.randn(9, 2 * width).to(dtype)[:, :width], torch.randn(9, width).to(dtype)
        weight = torch.randn(width).to(dtype)

        def expect(value: Tensor) -> Tensor:
            return value * (value.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()

        close(norm.rms_norm(x, None, 1e-5), expect(x.double()), 2)
        close(norm.rms_norm(x, weight, 1e-5), expect(x.double()) * weight.double(), 2)
        normed, total = norm.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(total, x + residual)
        close(normed, expect(total.double()) * weight.double(), 2)


def check_act() -> None:
    """Gate rows of any width, also where the gate is far from zero."""
    for dtype, width, kind in itertools.product(DTYPES, (1, 16, 75), ("silu", "gelu_tanh")):
        both = (torch.randn(5, 2 * width + 1) * 20).to(dtype)[:, : 2 * width]
        gate, up = both.double().chunk(2, dim=-1)
        close(act.act_and_mul(both, kind), activation(gate, kind) * up, 4)  # type: ignore[arg-type]


def check_write_kv() -> None:
    """Norm, rotate and write every kind of layer; slots that nobody asked for stay as they were."""
    for dtype, int8, dim, (kv_heads, form) in itertools.product(
        DTYPES, (False, True), (6, 64), ((2, "qkv"), (1, "qk"), (2, "q"))
    ):
        heads, tokens = 4, 5
        columns = heads + {"qkv": 2, "qk": 1, "q": 0}[form] * kv_heads
        qkv = torch.randn(tokens, columns * dim + 2).to(dtype)[:, :-2]
        positions, inv_freq = torch.tensor([0, 7, 300, 2, 5]), torch.rand(dim // 2)
        slots = torch.tensor([3, 0, 9, -1, 4])
        stored = torch.int8 if int8 else dtype
        planes = [torch.full((12, kv_heads * dim + 3), 77).to(stored) for _ in range(2)]
        k, v = (plane[:, : kv_heads * dim].unflatten(1, (kv_heads, dim)) for plane in planes)
        scales = [torch.full((12, kv_heads), 77.0) for _ in range(2)] if int8 else [None, None]
        qk_norm = torch.randn(heads + (kv_heads if form != "q" else 0), dim) if form != "qk" else None
        cos, sin = kv_write.rope_angles(positions, inv_freq, 1.5)
        angles = positions[:, None].float() * inv_freq
        close(cos, angles.double().cos() * 1.5, 4)
        q = kv_write.write_kv(
            qkv, cos, sin, slots, k, v, *scales, num_heads=heads, qk_norm=qk_norm, v_norm=True, eps=1e-6
        )
        wanted = qkv.double().view(tokens, columns, dim)
        turned = wanted[:, : heads + (kv_heads if form != "q" else 0)]
        if qk_norm is not None:
            turned = turned * (turned.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * qk_norm.double()
        first, second = turned.chunk(2, dim=-1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
        close(q, turned[:, :heads], 2)
        values = wanted[:, -kv_heads:] * (wanted[:, -kv_heads:].pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        for cache, scale, new in ((k, scales[0], turned[:, heads:]), (v, scales[1], values)):
            _stored(cache, scale, new if form != "q" else None, slots)
        assert all(bool((plane[:, kv_heads * dim :] == 77).all()) for plane in planes)


def _stored(cache: Tensor, scale: Tensor | None, wanted: Tensor | None, slots: Tensor) -> None:
    written = slots[slots >= 0] if wanted is not None else slots[:0]
    rest = [slot for slot in range(len(cache)) if slot not in written.tolist()]
    assert bool((cache[rest] == 77).all())
    if wanted is None:
        return
    wanted = wanted[slots >= 0]
    if scale is None:
        close(cache[written], wanted, 2)
        return
    largest = wanted.abs().amax(-1)
    assert torch.allclose(scale[written].double(), largest / INT8_MAX, rtol=1e-2)
    error = (cache[written].double() * scale[written][..., None].double() - wanted).abs()
    assert bool((error <= scale[written][..., None] * 0.6 + wanted.abs() * 2**-7).all())
    assert bool((scale[rest] == 77).all())


def attend(
    lengths: list[tuple[int, int]], *, group: int = 3, kv_heads: int = 2, dim: int = 64, dtype: torch.dtype,
    int8: bool = False, window: int | None = None, softcap: float | None = None, block: int = 16,
) -> None:  # fmt: skip
    """Attend rows of (new tokens, context) and compare; slots outside the contexts hold NaN or rubbish."""
    tokens, rows = sum(new for new, _ in lengths), len(lengths)
    width = max(-(-context // block) for _, context in lengths)
    order = torch.randperm(rows * width + 1)
    table = order[: rows * width].view(rows, width).to(torch.int32)
    num_slots, stored = (rows * width + 1) * block, torch.int8 if int8 else dtype
    planes = [torch.full((num_slots, kv_heads * dim + 5), 127 if int8 else torch.nan).to(stored) for _ in range(2)]
    caches = [plane[:, : kv_heads * dim].unflatten(1, (kv_heads, dim)) for plane in planes]
    scales = [torch.full((num_slots, kv_heads), torch.nan) for _ in range(2)] if int8 else [None, None]
    q = torch.randn(tokens, kv_heads * group, dim + 0).to(dtype)
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    cu_q = torch.tensor([0, *itertools.accumulate(new for new, _ in lengths)], dtype=torch.int32)
    expected = torch.empty(tokens, kv_heads * group, dim, dtype=torch.float64)
    for row, (new, context) in enumerate(lengths):
        at = torch.arange(context)
        slots = table[row, at // block].long() * block + at % block
        seen = at if window is None else at[max(0, context - new - window + 1) :]
        kept = slots[seen]
        for cache, scale in zip(caches, scales, strict=True):
            values = torch.randn(len(kept), kv_heads, dim)
            cache[kept] = (values * 40).clamp(-127, 127).to(stored) if int8 else values.to(stored)
            if scale is not None:
                scale[kept] = torch.rand(len(kept), kv_heads) / 20
        k, v = (
            c[kept].double() * (1 if s is None else s[kept].double()[..., None])
            for c, s in zip(caches, scales, strict=True)
        )
        position = torch.arange(context - new, context)[:, None]
        visible = (seen <= position) & (seen > position - (window or context + 1))
        mine = q[cu_q[row] : cu_q[row + 1]].double().unflatten(1, (kv_heads, group))
        scores = torch.einsum("thgd,xhd->hgtx", mine, k) * 0.2
        scores = scores if softcap is None else (scores / softcap).tanh() * softcap
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        expected[cu_q[row] : cu_q[row + 1]] = torch.einsum("hgtx,xhd->thgd", weights, v).flatten(1, 2)
    got = attention.paged_attention(
        q, caches[0], caches[1], scales[0], scales[1], table, contexts, cu_q,
        block_size=block, scale=0.2, window=window, softcap=softcap,
    )  # fmt: skip
    close(got, expected, 8)


def check_decode() -> None:
    """Decode rows of every length round a block, a piece of keys and a division of the context."""
    for dtype, dim in ((torch.float32, 64), (torch.bfloat16, 128), (torch.float16, 80), (torch.float32, 6)):
        attend([(1, n) for n in (1, 15, 16, 17, 63, 64, 65, 129)], dtype=dtype, dim=dim)
    attend([(1, 700)], dtype=torch.float32)
    attend([(1, 515), (1, 3)], dtype=torch.bfloat16, kv_heads=1, group=1, block=4)
    attend([(1, 40)], dtype=torch.float32, group=20, kv_heads=1, dim=32)
    attend([(1, 33)], dtype=torch.float32, group=2, kv_heads=1, dim=512)


def check_prefill() -> None:
    """Attend prompts, chunks of them and drafts, together with decodes."""
    attend([(40, 40), (1, 90), (7, 80), (17, 17)], dtype=torch.float32)
    attend([(70, 200)], dtype=torch.bfloat16, group=1, dim=32)
    attend([(5, 70), (4, 4), (30, 131)], dtype=torch.float16, dim=80, block=4)
    attend([(13, 29)], dtype=torch.float32, group=1, kv_heads=3, dim=6)
    attend([(20, 150)], dtype=torch.bfloat16, group=2, kv_heads=1, dim=512)
    attend([(300, 1500)], dtype=torch.float32)


def check_window() -> None:
    """See a window and nothing before it, whose blocks belong to others by now."""
    for window in (1, 8, 40, 200):
        attend([(1, 100), (30, 90), (1, 5), (3, 300), (90, 90)], dtype=torch.float32, window=window)


def check_softcap() -> None:
    """Bend scores before the softmax."""
    attend([(1, 50), (9, 20), (30, 200)], dtype=torch.float32, softcap=0.7)


def check_int8_kv() -> None:
    """Attend to quantised keys and values."""
    attend([(1, 300), (20, 60)], dtype=torch.float32, int8=True)
    attend([(1, 70), (2, 40)], dtype=torch.bfloat16, int8=True, window=20)


def check_route() -> None:
    """Choose the largest, the first of equals, and renormalise."""
    for dtype, experts in itertools.product(DTYPES, (5, 128)):
        logits = torch.randn(20, experts).to(dtype)
        logits[3] = 1.0
        weights, ids = moe.route(logits, 3)
        assert ids[3].tolist() == [0, 1, 2]
        probabilities = logits.double().softmax(-1)
        close(weights, (best := probabilities.gather(1, ids)) / best.sum(-1, keepdim=True), 4)
        assert torch.equal(best.amin(-1), probabilities.topk(3).values[:, -1])


def check_moe() -> None:
    """Give tokens to their experts, one of which gets none; padding goes to nobody."""
    for dtype, width, kind_of_int8 in itertools.product(
        (torch.float32, torch.bfloat16), (24, 32), ("", "rounded", "exact")
    ):
        int8 = kind_of_int8 != ""
        experts, hidden, kind = 4, 40, "silu"
        x, ids = (
            torch.randn(7, hidden).to(dtype),
            torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [2, 3], [3, 0], [-1, -1]]),
        )
        x[6] = torch.nan
        weights, load = torch.rand(7, 2), torch.arange(experts)
        matrices = [torch.randn(experts, 2 * width, hidden) / 6, torch.randn(experts, hidden, width) / 6]
        scales = None
        if int8:
            factors = [m.abs().amax(-1) / INT8_MAX for m in matrices]
            stored = [(m / f[..., None]).round().to(torch.int8) for m, f in zip(matrices, factors, strict=True)]
            scales = (factors[0], factors[1])
            gate_up, down = (s.double() * f.double()[..., None] for s, f in zip(stored, factors, strict=True))
        else:
            stored = [m.to(dtype) for m in matrices]
            gate_up, down = (m.double() for m in stored)
        held: Kind = "int8_exact" if kind_of_int8 == "exact" else stored[0].dtype
        packed = [linear.pack(m, held) for m in stored]
        got = moe.moe(x, weights, ids, packed[0], packed[1], load, width, (held, held), kind, scales)
        assert load.tolist() == [5, 1, 2 + 5, 3 + 2]
        assert bool((got[6] == 0).all())
        for token in range(6):
            parts = [gate_up[e] @ x[token].double() for e in ids[token]]
            inner = [activation(part[:width], kind) * part[width:] for part in parts]
            answers = [down[e] @ h * w for e, h, w in zip(ids[token], inner, weights[token].double(), strict=True)]
            close(
                got[token],
                torch.stack(answers).sum(0),
                2**16 if kind_of_int8 == "rounded" and dtype == torch.float32 else 32,
            )


def check_isolation() -> None:
    """NaN and infinity in one row stay in it, through INT8 activations too."""
    for dtype, bad in itertools.product((torch.float32, torch.bfloat16), (torch.nan, torch.inf)):
        x = torch.randn(9, 64).to(dtype)
        clean = x.clone()
        x[4, 10] = bad
        weight, whole = torch.randn(40, 64).to(dtype), torch.randint(-127, 128, (40, 64), dtype=torch.int8)
        for packed, kind, scale in ((weight, dtype, None), (whole, torch.int8, torch.rand(40))):
            got, want = (linear.linear(rows, linear.pack(packed), (40, 64), kind, scale=scale) for rows in (x, clean))
            assert not bool(got[4].isfinite().any())
            others = [0, 1, 2, 3, 5, 6, 7, 8]
            assert torch.equal(got[others], want[others])
        assert not bool(norm.rms_norm(x, None, 1e-6)[4].isfinite().all())


def check_prepare() -> None:
    """Look up tables of two groups, of which a part of the columns is wanted, and the slots of rows in any order."""
    rows, positions = torch.tensor([3, 5, 0, 3]), torch.tensor([7, 0, 9, 32])
    sizes = [(16, 4), (40, 3)]
    tables = [torch.randint(1, 99, (6, 40), dtype=torch.int32) for _ in sizes]
    groups = [(table, width, size) for table, (width, size) in zip(tables, sizes, strict=True)]
    done = step.prepare(rows, positions, groups, padding_row=5)
    assert done.cu_q.tolist() == [0, 1, 2, 3, 4] and done.context.tolist() == [8, 1, 10, 33]
    assert done.padding.tolist() == [False, True, False, False]
    for (table, width, size), own, slots in zip(groups, done.tables, done.slots, strict=True):
        assert torch.equal(own, table[rows, :width])
        assert torch.equal(slots, table[rows, positions // size].long() * size + positions % size)


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): value
    for name, value in (*globals().items(), *vars(block_cases).items(), *vars(logits_cases).items())
    if name.startswith("check_")
}


def main(*flags: str) -> None:
    """Build with these flags and run every check."""
    base = [flag for flag in (*compiling.FLAGS, *compiling.native_flags()) if flag != "-O3"]
    with library.using(library.open_library(compiling.build(flags=(*base, *flags)))), poisoned():
        library.set_num_threads(2)
        for name, check in CHECKS.items():
            torch.manual_seed(1)
            check()
            print(name, flush=True)  # noqa: T201 - a script


if __name__ == "__main__":
    main(*sys.argv[1:])
