"""Problems of paged attention: random, every slot poisoned that no token wrote, with the answer in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.paged_attn import Tile, paged_attention

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


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
    fp8: bool = False  # with int8: e4m3 instead
    window: int | None = None
    softcap: float | None = None
    blocks: int | None = None  # that share a key head, as of `paged_attention`
    padding: int = 0  # entries between slots
    tile: Tile | None = None
    bound: int = 0  # on the context, for a grid that was cut before the contexts are known

    def __str__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if value != getattr(Case, name)}
        return " ".join(f"{name}={value}" for name, value in shown.items()) or "defaults"

    @property
    def cache_bytes(self) -> int:
        """Keys, values and scales that the sequences' tokens see."""
        entry = self.head_dim * (1 if self.int8 else 2) + (4 if self.int8 else 0)
        return 2 * self.kv_heads * entry * sum(context for _, context in self.sequences)

    def first(self, row: int) -> int:
        """Return the first position that a token of a sequence sees."""
        tokens, length = self.sequences[row]
        return 0 if self.window is None else max(0, length - tokens + 1 - self.window)


CASES = [
    Case(),
    Case(sequences=((1, 130), (1, 0), (1, 64), (1, 65)), blocks=3),
    Case(head_dim=64, kv_heads=1, sequences=((1, 20), (1, 400), (0, 0), (1, 0), (1, 30)), blocks=4),
    Case(head_dim=64, kv_heads=1, group=1, sequences=((1, 20),) * 40, blocks=3),
    Case(head_dim=64, kv_heads=1, group=7, sequences=((1, 300), (4, 90)), window=100, blocks=2),
    Case(head_dim=64, kv_heads=1, group=7, sequences=((40, 240), (1, 9)), blocks=5),
    Case(head_dim=64, group=7, sequences=((5, 40), (1, 17))),
    Case(kv_heads=1, group=1, sequences=((40, 40), (3, 90)), softcap=5.0),
    Case(head_dim=256, group=2, kv_heads=1, sequences=((1, 70),), window=33, block_size=32),
    Case(head_dim=512, group=4, kv_heads=1, sequences=((1, 40), (1, 33))),
    Case(head_dim=80, kv_heads=1, sequences=((1, 130), (1, 17), (1, 70)), blocks=4),
    Case(head_dim=96, sequences=((20, 80), (1, 9))),
    Case(head_dim=80, int8=True, sequences=((30, 70), (1, 20))),
    Case(kv_heads=1, group=5, sequences=((50, 120), (1, 0)), blocks=0, tile=Tile(128, 32, 1, 2, warp_rows=32)),
    Case(int8=True, sequences=((1, 100), (1, 31)), blocks=2, padding=128),
    Case(int8=True, head_dim=64, group=7, kv_heads=1, sequences=((12, 80),), window=17),
    Case(int8=True, fp8=True, head_dim=64, group=7, kv_heads=1, sequences=((1, 70), (3, 20)), blocks=2, softcap=5.0),
]
MATRIX = [
    Case(head_dim=256, group=8, kv_heads=1, sequences=((9, 50),), window=20),
    Case(head_dim=256, group=2, kv_heads=1, sequences=((9, 40),), int8=True),
    Case(head_dim=512, group=8, kv_heads=1, sequences=((5, 37),), padding=64),
    Case(dtype=torch.float16, int8=True, kv_heads=1, sequences=((30, 70),)),
    Case(dtype=torch.float16, head_dim=64, sequences=((1, 50),), blocks=2),
    Case(head_dim=64, kv_heads=1, group=1, sequences=((1, 4200),), blocks=70),
    *(Case(head_dim=head_dim, kv_heads=1, group=4, int8=int8, fp8=fp8, sequences=((40, 130), (33, 33)), blocks=0,
           tile=Tile(128, keys, 1, 3, warp_rows=32), window=window, softcap=softcap, dtype=dtype)
      for head_dim, int8, fp8, keys in ((64, False, False, 64), (64, True, False, 32), (96, False, False, 32),
                                        (128, True, False, 32), (128, True, True, 32))
      for window, softcap in ((None, None), (21, 20.0)) for dtype in (torch.bfloat16, torch.float16)),
    *(Case(dtype=dtype, int8=True, fp8=True, kv_heads=1, head_dim=head_dim, sequences=sequences, window=window)
      for dtype in (torch.bfloat16, torch.float16) for head_dim in (64, 80, 96, 128, 256, 512)
      for sequences, window in ((((1, 193), (1, 15)), None), (((40, 77), (5, 5)), 19)))
] + [
    Case(head_dim=head_dim, group=group, kv_heads=1, int8=int8, window=window, softcap=softcap, blocks=blocks,
         sequences=sequences, block_size=block_size, dtype=dtype)
    for head_dim, group in ((64, 1), (64, 7), (80, 4), (96, 1), (128, 4), (128, 8), (256, 4), (512, 8))
    for int8 in (False, True)
    for window, softcap, blocks in ((None, None, None), (19, None, 2), (None, 30.0, 3))
    for sequences, block_size in ((((1, 1), (1, 15), (1, 16), (1, 17), (1, 0), (1, 193)), 16),
                                  (((5, 5), (40, 77), (1, 33)), 32))
    for dtype in (torch.bfloat16, torch.float16)
]  # fmt: skip
# Too large to simulate: many tiles and splits, chosen by the device.
LARGE = [
    Case(head_dim=head_dim, kv_heads=2, group=group, int8=int8, fp8=fp8, sequences=sequences)
    for head_dim, group in ((64, 7), (80, 4), (96, 1), (128, 4), (128, 1), (256, 4), (512, 8))
    for int8, fp8 in ((False, False), (True, False), (True, True))
    for sequences in (((1, 4099), (1, 700), (1, 3)), ((900, 1000), (1, 2049), (70, 70)))
]


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

    def run(self) -> Tensor:
        """Attend by the kernel."""
        case = self.case
        return paged_attention(
            self.q, self.k, self.v, self.k_scale, self.v_scale, self.tables, self.context_lens, self.cu_q,
            block_size=case.block_size, max_q=max(n for n, _ in case.sequences),
            max_context=max(case.bound, *(n for _, n in case.sequences)), scale=case.head_dim**-0.5, window=case.window,
            softcap=case.softcap, tile=case.tile, blocks=case.blocks,
        )  # fmt: skip

    def slots(self, row: int) -> Tensor:
        """Return where a sequence's keys and values lie, from the first that is seen."""
        positions = torch.arange(self.case.first(row), self.case.sequences[row][1], device=self.q.device)
        return self.tables[row, positions // self.case.block_size].long() * self.case.block_size + (
            positions % self.case.block_size
        )

    def gather(self, row: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a sequence's keys and values [X, Hkv, D], int8 ones times their scales."""
        slots = self.slots(row)
        k, v = self.k[slots].to(dtype), self.v[slots].to(dtype)
        if self.k_scale is not None and self.v_scale is not None:
            k, v = k * self.k_scale[slots][..., None].to(dtype), v * self.v_scale[slots][..., None].to(dtype)
        return k, v

    def expect(self) -> Tensor:
        """Attend in float64."""
        outs = [self._expect_row(row) for row in range(len(self.case.sequences))]
        return torch.cat(outs)

    def _expect_row(self, row: int) -> Tensor:
        case, (tokens, length) = self.case, self.case.sequences[row]
        q = self.q[int(self.cu_q[row]) : int(self.cu_q[row + 1])].double()
        if length == 0:
            return torch.zeros_like(q)
        k, v = (x.repeat_interleave(case.group, dim=1) for x in self.gather(row, torch.float64))
        scores = torch.einsum("qhd,khd->hqk", q, k) * case.head_dim**-0.5
        if case.softcap is not None:
            scores = case.softcap * (scores / case.softcap).tanh()
        position = torch.arange(length - tokens, length, device=q.device)[:, None]
        key = torch.arange(case.first(row), length, device=q.device)
        visible = key <= position
        if case.window is not None:
            visible &= key > position - case.window
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def make(case: Case, device: torch.device = CPU) -> Problem:
    """Fill a shuffled pool: only slots that a query may see hold numbers, and only their table entries are valid."""
    torch.manual_seed(len(str(case)))
    size = case.block_size
    blocks = [-(-context // size) for _, context in case.sequences]
    order = (torch.randperm(sum(blocks) + 2) + 1)[: sum(blocks)].split(blocks)  # block 0 is the null block
    num_slots = (sum(blocks) + 3) * size
    tables = torch.full((len(blocks), max(1, *blocks)), -1, dtype=torch.int32)
    for row, own in enumerate(order):
        seen = case.first(row) // size
        tables[row, seen : blocks[row]] = own[seen:].int()
    counts = torch.tensor([0] + [tokens for tokens, _ in case.sequences])
    heads = case.kv_heads * case.group
    q = torch.randn(int(counts.sum()), heads, case.head_dim, device=device).to(case.dtype)
    context = torch.tensor([n for _, n in case.sequences], dtype=torch.int32)
    k, v = (_poisoned(case, num_slots, device) for _ in range(2))
    k_scale = v_scale = None
    if case.int8:
        k_scale, v_scale = (torch.full((num_slots, case.kv_heads), torch.nan, device=device) for _ in range(2))
    cu_q = counts.cumsum(0).int()
    problem = Problem(case, q, k, v, k_scale, v_scale, tables.to(device), context.to(device), cu_q.to(device))
    slots = torch.cat([problem.slots(row) for row in range(len(blocks))])
    _write(k, k_scale, slots)
    _write(v, v_scale, slots)
    return problem


def _poisoned(case: Case, num_slots: int, device: torch.device) -> Tensor:
    stride = case.kv_heads * case.head_dim + case.padding
    fill, dtype = (torch.nan, FP8) if case.fp8 else (99, torch.int8) if case.int8 else (torch.nan, case.dtype)
    pool = torch.full((num_slots * stride,), fill, dtype=dtype, device=device)
    return pool.as_strided((num_slots, case.kv_heads, case.head_dim), (stride, case.head_dim, 1))


def _write(cache: Tensor, scale: Tensor | None, slots: Tensor) -> None:
    """Write random entries of random size."""
    entries = torch.randn(len(slots), *cache.shape[1:], device=cache.device)
    entries *= torch.rand(*entries.shape[:2], 1, device=cache.device) * 2
    if scale is None:
        cache[slots] = entries.to(cache.dtype)
    elif cache.dtype == FP8:
        scale[slots] = entries.abs().amax(-1) / torch.finfo(FP8).max
        cache.view(torch.uint8)[slots] = (entries / scale[slots][..., None]).to(FP8).view(torch.uint8)
    else:
        scale[slots] = entries.abs().amax(-1) / 127
        cache[slots] = (entries / scale[slots][..., None]).round().to(torch.int8)
