"""Problems of paged attention for `check` and `bench`, with their answer in float64."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from cuda_kernels.paged_attn import paged_attention

BLOCK = 16


@attrs.frozen
class Attention:
    """Sequences of (tokens of this step, context)."""

    head_dim: int
    kv_heads: int
    group: int
    sequences: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.bfloat16
    int8: bool = False
    window: int | None = None
    softcap: float | None = None
    splits: int | None = None

    @staticmethod
    def cases(dtype: torch.dtype, scale: int) -> Iterator[Attention]:
        """Yield every head size, as decode and as prefill, with the options spread over them."""
        decode, prefill = ((1, 33 * scale), (1, 7)), ((5 * scale, 9 * scale),)
        yield Attention(64, 2, 7, decode, dtype)
        yield Attention(64, 1, 1, prefill, dtype, softcap=20.0)
        yield Attention(128, 2, 4, decode, dtype, splits=2)
        yield Attention(128, 1, 4, prefill, dtype, int8=True)
        yield Attention(256, 1, 2, decode, dtype, window=11 * scale)
        yield Attention(256, 1, 4, prefill, dtype, int8=True)
        yield Attention(512, 1, 8, decode, dtype)
        yield Attention(512, 1, 8, prefill, dtype, int8=True)

    def make(self, device: torch.device) -> Problem:
        """Fill a pool whose blocks are shuffled."""
        blocks = [-(-context // BLOCK) for _, context in self.sequences]
        order = (torch.randperm(sum(blocks)) + 1).split(blocks)
        tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        for table, own in zip(tables, order, strict=True):
            table[: len(own)] = own
        shape = ((sum(blocks) + 1) * BLOCK, self.kv_heads, self.head_dim)
        k, v = torch.randn(2, *shape, device=device)
        k_scale = v_scale = None
        if self.int8:
            (k, k_scale), (v, v_scale) = _quantise(k), _quantise(v)
        else:
            k, v = k.to(self.dtype), v.to(self.dtype)
        counts = torch.tensor([0] + [tokens for tokens, _ in self.sequences])
        q = torch.randn(int(counts.sum()), self.kv_heads * self.group, self.head_dim).to(device, self.dtype)
        context = torch.tensor([context for _, context in self.sequences], dtype=torch.int32)
        cu = counts.cumsum(0).int()
        return Problem(self, q, k, v, k_scale, v_scale, tables.to(device), context.to(device), cu.to(device))

    @property
    def cache_bytes(self) -> int:
        """Keys, values and scales that the sequences' tokens see."""
        entry = self.head_dim * (1 if self.int8 else 2) + (4 if self.int8 else 0)
        return 2 * self.kv_heads * entry * sum(context for _, context in self.sequences)


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1) / 127
    return x.div(scale[..., None]).round().to(torch.int8), scale


@attrs.frozen(eq=False)
class Problem:
    """The tensors of a case."""

    case: Attention
    q: Tensor
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    tables: Tensor
    context: Tensor
    cu_q: Tensor

    def run(self) -> Tensor:
        """Attend by the kernel."""
        case = self.case
        return paged_attention(
            self.q, self.k, self.v, self.k_scale, self.v_scale, self.tables, self.context, self.cu_q,
            block_size=BLOCK, max_q=max(n for n, _ in case.sequences), max_context=max(n for _, n in case.sequences),
            scale=case.head_dim**-0.5, window=case.window, softcap=case.softcap, splits=case.splits,
        )  # fmt: skip

    def gather(self, row: int) -> tuple[Tensor, Tensor]:
        """Return a sequence's keys and values [X, Hkv, D], int8 ones times their scales in float32."""
        positions = torch.arange(self.case.sequences[row][1], device=self.q.device)
        slots = self.tables[row, positions // BLOCK].long() * BLOCK + positions % BLOCK
        k, v = self.k[slots], self.v[slots]
        if self.k_scale is not None and self.v_scale is not None:
            k, v = k * self.k_scale[slots][..., None], v * self.v_scale[slots][..., None]
        return k, v

    def expect(self) -> Tensor:
        """Attend in float64."""
        case, outs = self.case, []
        for row, (tokens, length) in enumerate(case.sequences):
            q = self.q[int(self.cu_q[row]) : int(self.cu_q[row + 1])].double()
            k, v = (x.double().repeat_interleave(case.group, dim=1) for x in self.gather(row))
            scores = torch.einsum("qhd,khd->hqk", q, k) * case.head_dim**-0.5
            if case.softcap is not None:
                scores = case.softcap * (scores / case.softcap).tanh()
            position = torch.arange(length - tokens, length, device=q.device)[:, None]
            key = torch.arange(length, device=q.device)
            visible = key <= position
            if case.window is not None:
                visible &= key > position - case.window
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(outs)
