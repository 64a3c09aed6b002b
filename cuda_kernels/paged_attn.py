"""Attention over the paged cache on a GPU: one kernel for prefill, chunked prefill, draft verification and decode."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cuda_kernels.launch import Kernel, io_define, kernel, unfit
from cuda_kernels.tickets import take_tickets
from cuda_kernels.tuning import BY_ARCHITECTURE, Tuning, tuning

HEAD_DIMS = (64, 80, 96, 128, 256, 512)
MAX_PARTS = 64  # of a context, as in paged_attn_tile.cuh
PART_BYTES = 96  # what a block is doing, as in paged_attn_tile.cuh
RESERVED_BYTES = 1024  # of shared memory by CUDA, for each block
REGISTERS = 65536
MAX_STAGES = 4  # guessed: three tiles on their way
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


def tiled(head_dim: int) -> int:
    """Return the dimensions of a row in shared memory, a power of two: TILED in paged_attn_tile.cuh."""
    return 128 if 64 < head_dim < 128 else head_dim


@dataclass(frozen=True)
class Tile:
    """How a block divides its work (see paged_attn.cu): rows, keys at a time, warps by column, tiles in flight."""

    rows: int
    keys: int
    warps_n: int
    stages: int
    warp_rows: int = 16

    @property
    def threads(self) -> int:
        return self.rows // self.warp_rows * self.warps_n * 32

    def shared_bytes(self, head_dim: int, *, int8: bool) -> int:
        dims = tiled(head_dim)
        stage = 2 * self.keys * (dims * (1 if int8 else 2) + (4 if int8 else 0))
        exchange = self.rows * self.keys * 2 + self.warps_n * self.rows * 4 if self.warps_n > 1 else 0
        return self.stages * stage + self.rows * dims * 2 + exchange + PART_BYTES

    def blocks(self, head_dim: int, device: Device, *, int8: bool) -> int:
        """Return how many blocks fit on a multiprocessor: in its shared memory and its registers."""
        registers = REGISTERS // (self.threads * (128 if self.rows == 16 else 256))
        own = self.shared_bytes(head_dim, int8=int8) + RESERVED_BYTES
        return min(registers, (device.shared_bytes + RESERVED_BYTES) // own)

    def deepened(self, blocks: int, head_dim: int, device: Device, *, int8: bool) -> Tile:
        """Return the same with all tiles in flight for which `blocks` on a multiprocessor leave room."""
        deeper = (replace(self, stages=stages) for stages in range(MAX_STAGES, self.stages, -1))
        return next((tile for tile in deeper if tile.blocks(head_dim, device, int8=int8) >= blocks), self)


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
    return two if two.shared_bytes(head_dim, int8=int8) <= device.shared_bytes else replace(two, stages=1)


def widened(tile: Tile, tiles: int, head_dim: int, device: Device, *, int8: bool) -> Tile:
    """Return what takes the place of a tile that no blocks share: 32 rows a warp, so that a read serves twice as many.

    Args:
        tiles: The work in all; with fewer than the device has room for, more warps of fewer rows are faster.
    """
    widest = min(64, device.tuning.widest_head) if int8 else device.tuning.widest_head
    if tile.rows < 128 or head_dim > widest:
        return tile
    wide = Tile(128, 64 if head_dim == 64 and not int8 else 32, 1, stages=2, warp_rows=32)  # more keys spill
    together = wide.blocks(head_dim, device, int8=int8)
    return wide if together > 1 and tiles >= together * device.multiprocessors else tile


def choose_blocks(row_tiles: int, sequences: int, kv_heads: int, max_keys: int, resident: int, own: Tuning) -> int:
    """Return how many blocks share the work of a key head; 0 for a block of its own for each tile of rows."""
    tiles = row_tiles * sequences
    if row_tiles > 1 and tiles * kv_heads >= resident:
        return 0
    useful = tiles * min(MAX_PARTS, -(-max_keys // own.least_split_keys))
    return max(1, min(resident // kv_heads, useful))


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
    out: Tensor | None = None,
    tile: Tile | None = None,
    blocks: int | None = None,
) -> Tensor:
    """Attend every token to its sequence's cached keys and values up to itself.

    Args:
        q: [S, Hq, D], contiguous.
        k_cache, v_cache: [slots, Hkv, D], the last two dimensions dense; q's dtype, or int8 or
            float8_e4m3fn with scales.
        k_scale, v_scale: [slots, Hkv] float32, or None.
        tables: [B, M] int32; entries before a window and past the end are never read.
        context_lens: [B] int32, tokens a sequence may see, its own of this step included; 0 gives zeros.
        cu_q: [B + 1] int32, where each sequence's tokens begin in S; others than from its first entry to its last are
            neither read nor written.
        block_size: Tokens per block, a power of two.
        max_q, max_context: Bounds on tokens of this step and on context over the sequences; they size the grid.
        out: [S, Hq, D], written to and returned.
        tile, blocks: Instead of what is chosen by these bounds. Blocks share the work of a key head; 0 is one for each
            tile of rows.
    Returns:
        [S, Hq, D] in q's dtype, accumulated in float32.
    """
    _, heads, head_dim = q.shape
    kv_heads, sequences = k_cache.shape[1], len(tables)
    int8, device = k_scale is not None, device_of(q.device)
    visible = max_context if window is None else min(max_context, window + max_q)
    packed = max_q * (heads // kv_heads)
    shape = _shape(packed, sequences, kv_heads, head_dim, visible, device, int8=int8, tile=tile, blocks=blocks)
    tile, out = shape.tile, torch.empty_like(q) if out is None else out
    partial, maxima = (_of_parts(q, shape, kv_heads, n) for n in (tiled(head_dim), 2))
    attend = _kernel(
        head_dim, heads // kv_heads, tile, shape.together, k_cache.dtype, split=shape.blocks > 0,
        window=window is not None, softcap=softcap is not None, fp16=io_define(q.dtype) or 0,
    )  # fmt: skip
    attend(
        shape.grid, (tile.threads, 1, 1), tile.shared_bytes(head_dim, int8=int8),
        q, k_cache, v_cache, k_scale, v_scale, tables, context_lens, cu_q, partial, maxima,
        take_tickets(q.device, shape.blocks * kv_heads), out, sequences, tables.stride(0),
        block_size.bit_length() - 1, k_cache.stride(0), 0 if k_scale is None else k_scale.stride(0),
        shape.least_tiles, window or 0, scale, softcap or 0.0,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class _Shape:
    """How a launch is laid out.

    Attributes:
        together: Blocks that fit on a multiprocessor.
        blocks: That share the work of a key head; 0 for one per tile of rows.
        least_tiles: Of keys, that are worth a block.
    """

    tile: Tile
    together: int
    blocks: int
    least_tiles: int
    grid: tuple[int, int, int]


def _of_parts(q: Tensor, shape: _Shape, kv_heads: int, values: int) -> Tensor:
    """Make room for what blocks leave of a row to the last of its context: two parts each."""
    return q.new_empty(shape.blocks, kv_heads, 2, shape.tile.rows, values, dtype=torch.float32)


@functools.lru_cache(maxsize=1024)
def _shape(
    packed: int,
    sequences: int,
    kv_heads: int,
    head_dim: int,
    visible: int,
    device: Device,
    *,
    int8: bool,
    tile: Tile | None,
    blocks: int | None,
) -> _Shape:
    chosen, least_tiles = tile or choose_tile(packed, head_dim, device, int8=int8), 1
    row_tiles, together = -(-packed // chosen.rows), chosen.blocks(head_dim, device, int8=int8)
    if blocks is None:
        least_tiles = device.tuning.least_split_keys // chosen.keys
        resident = together * device.multiprocessors
        blocks = choose_blocks(row_tiles, sequences, kv_heads, visible, resident, device.tuning)
    grid = (blocks, kv_heads, 1) if blocks else (row_tiles, kv_heads, sequences)
    if tile is None:
        if not blocks:
            chosen = widened(chosen, math.prod(grid), head_dim, device, int8=int8)
            together = chosen.blocks(head_dim, device, int8=int8)
        fewest = min(together, -(-math.prod(grid) // device.multiprocessors))
        chosen = chosen.deepened(fewest, head_dim, device, int8=int8)
    return _Shape(chosen, together, blocks, least_tiles, grid)


@functools.cache
def _kernel(
    head_dim: int,
    group: int,
    tile: Tile,
    together: int,
    cache: torch.dtype,
    *,
    split: bool,
    window: bool,
    softcap: bool,
    fp16: int,
) -> Kernel:
    return kernel(
        "paged_attn.cu", "paged_attention", HEAD_DIM=head_dim, GQA=group, BM=tile.rows, BN=tile.keys,
        WARP_ROWS=tile.warp_rows, WARPS_N=tile.warps_n, STAGES=tile.stages, BLOCKS=together,
        KV_8BIT=int(cache.itemsize == 1), KV_FP8=int(cache == torch.float8_e4m3fn), SPLIT=int(split),
        WINDOW=int(window), SOFTCAP=int(softcap), IO_FP16=fp16,
    )  # fmt: skip
