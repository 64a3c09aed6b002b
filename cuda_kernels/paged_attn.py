"""Attention over the paged cache on a GPU: one kernel for prefill, chunked prefill, draft verification and decode."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.launch import Kernel, io_define, kernel, unfit
from cuda_kernels.tickets import take_tickets
from cuda_kernels.tuning import BY_ARCHITECTURE, Tuning, tuning

HEAD_DIMS = (64, 128, 256, 512)
MAX_SPLITS = 64  # two for each lane of the warp that joins them
MAX_GROUP = 64  # query heads per key head (guessed: no model has more)


@dataclass(frozen=True)
class Device:
    """What the choice of tiles and splits depends on."""

    multiprocessors: int
    shared_bytes: int
    tuning: Tuning = BY_ARCHITECTURE[9, 0]


SIMULATED = Device(multiprocessors=4, shared_bytes=227 * 1024)


@functools.cache
def device_of(device: torch.device) -> Device:
    """Return what a device is; of a CPU, what is simulated."""
    if device.type != "cuda":
        return SIMULATED
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin, tuning(device))


@dataclass(frozen=True)
class Tile:
    """How a block divides its work (see paged_attn.cu): rows, keys at a time, warps by column, tiles in flight."""

    rows: int
    keys: int
    warps_n: int
    stages: int

    @property
    def threads(self) -> int:
        return self.rows // 16 * self.warps_n * 32

    def shared_bytes(self, head_dim: int, *, int8: bool) -> int:
        stage = 2 * self.keys * (head_dim * (1 if int8 else 2) + (4 if int8 else 0))
        exchange = self.rows * self.keys * 2 + self.warps_n * self.rows * 4 if self.warps_n > 1 else 0
        return self.stages * stage + self.rows * head_dim * 2 + exchange


@functools.cache
def choose_tile(packed_rows: int, head_dim: int, device: Device, *, int8: bool) -> Tile:
    """Choose by the rows of the longest sequence of the step: tokens times query heads per key head."""
    if head_dim == 512:
        rows, keys, warps_n = (16 if packed_rows <= 16 else 32), 32, 4
    elif packed_rows <= 16:
        rows, keys, warps_n = 16, (32 if head_dim == 256 else 64), 4
    elif head_dim == 256:
        rows, keys, warps_n = 64, 32, (2 if int8 else 1)  # int8 in one warp's registers spills on sm_100
    elif packed_rows <= 64:
        rows, keys, warps_n = 64, 64, 1
    else:
        rows, keys, warps_n = 128, 64, 1
    two = Tile(rows, keys, warps_n, stages=2)
    return two if two.shared_bytes(head_dim, int8=int8) <= device.shared_bytes else Tile(rows, keys, warps_n, stages=1)


def choose_splits(blocks: int, max_keys: int, device: Device) -> int:
    """Split the context where `blocks` are too few to fill the device."""
    own = device.tuning
    wanted = -(-own.waves * device.multiprocessors // blocks)
    return max(1, min(wanted, max_keys // own.least_split_keys, own.max_splits, MAX_SPLITS))


def supports(q: Tensor, k_cache: Tensor, block_size: int) -> str | None:
    """Say why these cannot be taken; None where they can."""
    if reason := unfit(q):
        return reason
    if q.shape[-1] not in HEAD_DIMS:
        return f"head size {q.shape[-1]}"
    if q.shape[1] // k_cache.shape[1] > MAX_GROUP:
        return f"{q.shape[1] // k_cache.shape[1]} query heads per key head"
    if k_cache.stride(0) * k_cache.element_size() % 16:
        return f"slots of {k_cache.stride(0) * k_cache.element_size()} bytes"
    if block_size & (block_size - 1):
        return f"block size {block_size}"
    return None


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    tables: Tensor,
    context_lens: Tensor,
    cu_q: Tensor,
    *,
    block_size: int,
    max_q: int,
    max_context: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attend every token to its sequence's cached keys and values up to itself.

    Args:
        q: [S, Hq, D], contiguous.
        k_cache, v_cache: [slots, Hkv, D], the last two dimensions dense; q's dtype, or int8 or
            float8_e4m3fn with scales.
        k_scale, v_scale: [slots, Hkv] float32, or None.
        tables: [B, M] int32; entries before a window and past the end are never read.
        context_lens: [B] int32, tokens a sequence may see, its own of this step included; 0 gives zeros.
        cu_q: [B + 1] int32, where each sequence's tokens begin in S.
        block_size: Tokens per block, a power of two.
        max_q, max_context: Bounds on tokens of this step and on context over the sequences; they size the grid.
        tile, splits: Instead of what is chosen by these bounds; at most MAX_SPLITS.
    Returns:
        [S, Hq, D] in q's dtype, accumulated in float32.
    """
    _, heads, head_dim = q.shape
    kv_heads, sequences = k_cache.shape[1], len(tables)
    int8, device = k_scale is not None, device_of(q.device)
    packed = max_q * (heads // kv_heads)
    tile = tile or choose_tile(packed, head_dim, device, int8=int8)
    tiles = -(-packed // tile.rows)
    visible = max_context if window is None else min(max_context, window + max_q)
    splits = splits or choose_splits(tiles * kv_heads * sequences, visible, device)
    out = torch.empty_like(q)
    partial, maxima = _partial(q, splits)
    attend = _kernel(head_dim, heads // kv_heads, tile, k_cache.dtype, split=splits > 1, fp16=io_define(q.dtype) or 0)
    tickets = take_tickets(q.device, tiles * kv_heads * sequences) if splits > 1 else None
    attend(
        (tiles, kv_heads * splits, sequences), (tile.threads, 1, 1), tile.shared_bytes(head_dim, int8=int8),
        q, k_cache, v_cache, k_scale, v_scale, tables, context_lens, cu_q, partial, maxima, tickets, out,
        tables.stride(0), block_size.bit_length() - 1, k_cache.stride(0), 0 if k_scale is None else k_scale.stride(0),
        kv_heads, splits, window or 0, scale, softcap or 0.0,
    )  # fmt: skip
    return out


def _partial(q: Tensor, splits: int) -> tuple[Tensor | None, Tensor | None]:
    """Make room for what the splits of a context leave to the last of them: rows, and their maxima and sums."""
    if splits == 1:
        return None, None
    rows, maxima = (q.new_empty(*q.shape[:2], splits, n, dtype=torch.float32) for n in (q.shape[2], 2))
    return rows, maxima


@functools.cache
def _kernel(head_dim: int, group: int, tile: Tile, cache: torch.dtype, *, split: bool, fp16: int) -> Kernel:
    return kernel(
        "paged_attn.cu", "paged_attention", HEAD_DIM=head_dim, GQA=group, BM=tile.rows, BN=tile.keys,
        WARPS_N=tile.warps_n, STAGES=tile.stages, KV_8BIT=int(cache.itemsize == 1),
        KV_FP8=int(cache == torch.float8_e4m3fn), SPLIT=int(split), IO_FP16=fp16,
    )  # fmt: skip
