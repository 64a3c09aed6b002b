"""Checks of products with blocks against float64. Blocks are widened here from their definition, number by number."""

from __future__ import annotations

import itertools

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from cpu_kernels import linear, moe
from cpu_kernels.blocks import BlockKind, pack_blocks

# Bits, the scales' dtype, and what is added: nothing, a zero point or a minimum.
FORMS = (
    (4, torch.float16, "none"), (4, torch.float16, "zero"), (4, torch.float16, "minimum"), (4, torch.float32, "zero"),
    (4, torch.int8, "none"), (4, torch.int8, "minimum"), (8, torch.float16, "none"), (8, torch.float16, "minimum"),
    (8, torch.float32, "zero"), (8, torch.int8, "none"), (8, torch.int8, "minimum"),
)  # fmt: skip


@attrs.frozen(eq=False)
class Stored:
    """Random blocks: what `pack_blocks` takes, and the weight [..., N, K] in float64."""

    parts: dict[str, Tensor | None]
    wide: Tensor

    def pack(self) -> tuple[Tensor, BlockKind]:
        """Lay the blocks out."""
        parts = self.parts
        assert parts["weight"] is not None
        assert parts["scale"] is not None
        return pack_blocks(
            parts["weight"], parts["scale"], zero=parts["zero"], minimum=parts["minimum"], outer=parts["outer"]
        )


def make(bits: int, dtype: torch.dtype, added: str, outputs: int, inputs: int, group: int, *leading: int) -> Stored:
    """Draw blocks whose weights are below one; the extremes of every number occur."""
    shape = (*leading, outputs)
    least, most = (0, 15) if bits == 4 else (-128, 127)
    numbers = torch.randint(least, most + 1, (*shape, inputs))
    numbers[..., 0], numbers[..., -1] = least, most
    groups, outer = inputs // group, None
    if dtype == torch.int8:
        scale = torch.randint(-128, 128, (*shape, groups), dtype=torch.int8)
        outer = (torch.rand(*shape, inputs // 256, 2 if added == "minimum" else 1) / 2e4).half()
        factor = scale.double() * outer[..., 0].double().repeat_interleave(256 // group, -1)
    else:
        scale = (torch.rand(*shape, groups) / most).to(dtype)
        factor = scale.double()
    zero = minimum = None
    add = torch.zeros(*shape, groups, dtype=torch.float64)
    if added == "zero":
        zero = torch.randint(least, most + 1, (*shape, groups), dtype=torch.int8)
        add = -zero.double() * factor
    elif added == "minimum" and outer is not None:
        minimum = torch.randint(-128, 128, (*shape, groups), dtype=torch.int8)
        add = minimum.double() * outer[..., 1].double().repeat_interleave(256 // group, -1)
    elif added == "minimum":
        minimum = -torch.rand(*shape, groups).to(dtype)
        add = minimum.double()
    elif bits == 4:
        add = -8 * factor
    wide = numbers * factor.repeat_interleave(group, -1) + add.repeat_interleave(group, -1)
    if bits == 8:
        weight = numbers.to(torch.int8)
    else:
        inside = torch.arange(inputs)
        low, high = (numbers[..., inside % 32 // 16 == half] for half in (0, 1))
        weight = (low + 16 * high).to(torch.uint8)
    return Stored({"weight": weight, "scale": scale, "zero": zero, "minimum": minimum, "outer": outer}, wide)


def rounded(x: Tensor) -> Tensor:
    """Return activations as the kernels round them: to 8 bits, by the largest of each 32. In float64.

    The arithmetic before the rounding is that of the kernels, so that what is halfway goes the same way.
    """
    blocks = x.float().unflatten(1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return ((blocks * inverse).round().double() * scale.double()).flatten(1)


def near(got: Tensor, x: Tensor, wide: Tensor, bias: Tensor | float = 0.0) -> None:
    """Hold a product to float64: to that of rounded activations, and within the rounding to the true one."""
    assert got.isfinite().all()
    exact, size = x.double() @ wide.T + bias, x.abs().double() @ wide.abs().T
    most = x.double().unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1)
    bound = (most / 254) @ wide.abs().T
    assert bool(((got.double() - exact).abs() <= 1.01 * bound + 1e-5 * size + 1e-5).all())
    error = (got.double() - (rounded(x) @ wide.T + bias)).abs()
    assert bool((error <= 1e-5 * size + 1e-5).all()), f"{float(error.max()):.3g} too far"


def check_blocks() -> None:
    """Multiply by every form in groups of every size: rows from one to more than two tiles, panels not full."""
    for form, group, rows, outputs in itertools.product(FORMS, (16, 32, 128, 512), (1, 3, 9), (1, 45)):
        inputs = 512
        if form[1] == torch.int8 and group > 256:
            continue
        stored = make(*form, outputs, inputs, group)
        wide = torch.randn(rows, inputs + 3)
        x, bias = wide[:, :inputs], torch.randn(outputs)
        x[0, 32:64] = 0  # a block without a scale
        packed, kind = stored.pack()
        got = linear.linear(x, packed, (outputs, inputs), kind, bias=bias)
        near(got, x, stored.wide, bias)


def check_odd_groups() -> None:
    """Groups of 96 inputs, three of them, and activations of 16 bits."""
    for form, dtype in itertools.product(FORMS, (torch.bfloat16, torch.float16)):
        if form[1] == torch.int8:
            continue
        stored, x = make(*form, 33, 288, 96), torch.randn(5, 288).to(dtype)
        packed, kind = stored.pack()
        got = linear.linear(x, packed, (33, 288), kind)
        assert got.dtype == dtype
        wanted = rounded(x.float()) @ stored.wide.T
        size = x.abs().double() @ stored.wide.abs().T
        assert bool(((got.double() - wanted).abs() <= 2**-8 * (wanted.abs() + 0.01 * size)).all())


def check_whole_blocks() -> None:
    """Whole numbers as activations: every form is exact, the zero point and the minimum included."""
    for form, group in itertools.product(FORMS, (16, 32, 256)):
        stored = make(*form, 40, 512, group)
        x = torch.randint(-127, 128, (3, 512)).float()
        x[:, ::32] = 127  # so the scale of every 32 is one
        packed, kind = stored.pack()
        got = linear.linear(x, packed, (40, 512), kind).double()
        size = x.abs().double() @ stored.wide.abs().T
        assert bool(((got - x.double() @ stored.wide.T).abs() <= 2e-6 * size).all())


def check_gated_blocks() -> None:
    """Scale by a gate whose half ends in the middle of a panel, or at its end."""
    for form, width in itertools.product(FORMS, (5, 32, 50)):
        stored, x, bias = make(*form, 2 * width, 256, 32), torch.randn(3, 256), torch.randn(2 * width)
        packed, kind = stored.pack()
        got = linear.linear(x, packed, (2 * width, 256), kind, bias=bias, activation="silu")
        gate, up = (rounded(x) @ stored.wide.T + bias).chunk(2, dim=-1)
        wanted = F.silu(gate) * up
        assert bool(((got - wanted).abs() <= 1e-4 * (wanted.abs() + 1)).all())


def check_block_rows() -> None:
    """Read rows back out of panels; an id that is not there gives NaN."""
    ids = torch.tensor([[0, 32], [44, 31]])
    for form, dtype in itertools.product(FORMS, (torch.float32, torch.bfloat16)):
        stored = make(*form, 45, 512, 64 if form[1] != torch.int8 else 16)
        packed, kind = stored.pack()
        got = linear.embed(ids, packed, (45, 512), kind, None, dtype)
        assert got.dtype == dtype
        least = 2**-8 if dtype == torch.bfloat16 else 2**-20
        assert bool(((got - stored.wide[ids]).abs() <= least * (stored.wide[ids].abs() + 0.1)).all())
        assert bool(linear.embed(torch.tensor([45, -1]), packed, (45, 512), kind, None, dtype).isnan().all())


def check_block_experts() -> None:
    """Give tokens to experts of blocks, of one kind for both products or of two."""
    for first, second in ((FORMS[0], FORMS[0]), (FORMS[2], FORMS[6]), (FORMS[5], FORMS[9])):
        experts, hidden, width = 3, 256, 256
        gate_up = make(*first, 2 * width, hidden, 32, experts)
        down = make(*second, hidden, width, 32, experts)
        x, weights, ids = (
            torch.randn(5, hidden),
            torch.rand(5, 2),
            torch.tensor([[0, 2], [2, 0], [2, 0], [0, 2], [-1, -1]]),
        )
        load = torch.zeros(experts, dtype=torch.int64)
        (up, up_kind), (out, out_kind) = gate_up.pack(), down.pack()
        got = moe.moe(x, weights, ids, up, out, load, width, (up_kind, out_kind), "silu", None)
        assert load.tolist() == [4, 0, 4]
        assert bool((got[4] == 0).all())
        for token in range(4):
            parts = [gate_up.wide[e] @ rounded(x[token : token + 1])[0] for e in ids[token]]
            inner = [(F.silu(part[:width]) * part[width:])[None] for part in parts]
            said = [down.wide[e] @ rounded(h)[0] * w for e, h, w in zip(ids[token], inner, weights[token], strict=True)]
            wanted = torch.stack(said).sum(0)
            # What is between the products may be rounded either way: one part in 254 of its largest, here and there.
            assert float((got[token] - wanted).abs().max() / wanted.abs().max()) < 2e-3


def check_block_isolation() -> None:
    """NaN and infinity in one row stay in it."""
    for form, bad in itertools.product((FORMS[0], FORMS[6]), (torch.nan, torch.inf)):
        stored, x = make(*form, 40, 64, 32), torch.randn(9, 64)
        packed, kind = stored.pack()
        clean = x.clone()
        x[4, 10] = bad
        got, want = (linear.linear(rows, packed, (40, 64), kind) for rows in (x, clean))
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        assert not bool(got[4].isfinite().any())
        assert torch.equal(got[others], want[others])
