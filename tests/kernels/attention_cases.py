"""Paged attention: random problems with every slot poisoned that no token wrote, and the answer in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cuda_kernels.paged_attn import Tile, paged_attention


@dataclass(frozen=True)
class Case:
    """One problem: sequences of (tokens of this step, context) and how they attend."""

    head_dim: int = 128
    kv_heads: int = 2
    group: int = 4
    sequences: tuple[tuple[int, int], ...] = ((1, 33), (1, 1))
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    int8: bool = False
    window: int | None = None
    softcap: float | None = None
    splits: int | None = None
    padding: int = 0  # entries between slots
    tile: Tile | None = None

    def __str__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if value != getattr(Case, name)}
        return " ".join(f"{name}={value}" for name, value in shown.items()) or "defaults"


@dataclass
class Problem:
    """The tensors of a case."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    tables: Tensor
    context_lens: Tensor
    cu_q: Tensor
    keys: list[Tensor] = field(default_factory=list)  # per sequence [X, Hkv, D] float64, as attention should see them
    values: list[Tensor] = field(default_factory=list)

    def run(self) -> Tensor:
        case = self.case
        return paged_attention(
            self.q, self.k, self.v, self.k_scale, self.v_scale, self.tables, self.context_lens, self.cu_q,
            block_size=case.block_size, max_q=max(n for n, _ in case.sequences),
            max_context=max(n for _, n in case.sequences), scale=case.head_dim**-0.5, window=case.window,
            softcap=case.softcap, tile=case.tile, splits=case.splits,
        )  # fmt: skip


def make(case: Case) -> Problem:
    """Fill a shuffled pool: only slots that a query may see hold numbers, and only their table entries are valid."""
    torch.manual_seed(len(str(case)))
    size = case.block_size
    blocks = [-(-context // size) for _, context in case.sequences]
    order = (torch.randperm(sum(blocks) + 2) + 1)[: sum(blocks)].split(blocks)  # block 0 is the null block
    num_slots = (sum(blocks) + 3) * size
    stride = case.kv_heads * case.head_dim + case.padding
    dtype = torch.int8 if case.int8 else case.dtype
    k, v = (
        torch.full((num_slots * stride,), 99 if case.int8 else torch.nan, dtype=dtype).as_strided(
            (num_slots, case.kv_heads, case.head_dim), (stride, case.head_dim, 1)
        )
        for _ in range(2)
    )
    scales = [torch.full((num_slots, case.kv_heads), torch.nan) if case.int8 else None for _ in range(2)]
    tables = torch.full((len(blocks), max(1, *blocks)), -1, dtype=torch.int32)
    counts = torch.tensor([0] + [tokens for tokens, _ in case.sequences])
    q = torch.randn(int(counts.sum()), case.kv_heads * case.group, case.head_dim).to(case.dtype)
    context = torch.tensor([n for _, n in case.sequences], dtype=torch.int32)
    problem = Problem(case, q, k, v, *scales, tables, context, counts.cumsum(0).int())
    for row, (tokens, length) in enumerate(case.sequences):
        first = 0 if case.window is None else max(0, length - tokens + 1 - case.window)
        first_block = first // size
        tables[row, first_block : blocks[row]] = order[row][first_block:].int()
        positions = torch.arange(first, length)
        slots = order[row][positions // size] * size + positions % size
        for cache, scale, seen in ((k, scales[0], problem.keys), (v, scales[1], problem.values)):
            seen.append(_write(cache, scale, slots, first))
    return problem


def _write(cache: Tensor, scale: Tensor | None, slots: Tensor, first: int) -> Tensor:
    """Write random entries; returns them in float64 after `first` rows of zeros."""
    entries = torch.randn(len(slots), *cache.shape[1:]) * torch.rand(len(slots), cache.shape[1], 1) * 2
    if scale is None:
        cache[slots] = entries.to(cache.dtype)
        stored = cache[slots].double()
    else:
        scale[slots] = entries.abs().amax(-1) / 127
        cache[slots] = (entries / scale[slots][..., None]).round().to(torch.int8)
        stored = cache[slots].double() * scale[slots].double()[..., None]
    return torch.cat((torch.zeros(first, *stored.shape[1:], dtype=torch.float64), stored))


def reference(problem: Problem) -> Tensor:
    """Attend in float64."""
    case = problem.case
    outs: list[Tensor] = []
    for row, (tokens, length) in enumerate(case.sequences):
        q = problem.q[problem.cu_q[row] : problem.cu_q[row + 1]].double()
        if length == 0:
            outs.append(torch.zeros_like(q))
            continue
        k, v = (x[row].repeat_interleave(case.group, dim=1) for x in (problem.keys, problem.values))
        scores = torch.einsum("qhd,khd->hqk", q, k) * case.head_dim**-0.5
        if case.softcap is not None:
            scores = case.softcap * (scores / case.softcap).tanh()
        position, key = torch.arange(length - tokens, length)[:, None], torch.arange(length)
        visible = key <= position
        if case.window is not None:
            visible &= key > position - case.window
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v))
    return torch.cat(outs)
