"""Paged attention in torch: the reference for kernels, and the CPU path.

Rows of few tokens (decodes, checked drafts) run together, batched by similar length; a long row (a prefill
chunk) runs alone, in blocks of queries. Keys are gathered by slot. If a row is shorter than its batch mates, the gather
repeats the row's last slot under a mask: unwritten slots are never read. Slots and masks are computed once a step per
KV group and shared by its layers.

Letters: S tokens, R rows of a piece, C tokens of each, X gathered keys, Hq/Hkv heads, G = Hq / Hkv, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from trio_llm.model.device.host_sync import requires_host_sync
from trio_llm.model.paged.attention_batch import AttentionBatch
from trio_llm.model.paged.kv_cache import AttentionSpec, LayerKV

SHORT_TOKENS = 16  # rows of at most this many tokens are batched (guessed: a decode and its drafts)
PIECE_KEYS = 16_384  # keys gathered at a time for short rows: tens of MiB (guessed)
MIN_BUCKET = 64  # lengths up to this share one piece; then one piece per power of two
QUERY_BLOCK = 512  # queries of a long row that share one mask (guessed)


@attrs.frozen(eq=False)
class _Short:
    """R rows of C tokens: tokens [R * C] indexes S (None: all), slots [R * X], mask [R, 1, C * G or 1, X]."""

    tokens: Tensor | None
    num_rows: int
    slots: Tensor
    mask: Tensor

    def attend(self, q: Tensor, kv: LayerKV, spec: AttentionSpec, out: Tensor) -> None:
        rows, heads, dim = self.num_rows, spec.num_kv_heads, spec.head_dim
        mine = q if self.tokens is None else q[self.tokens]
        mine = mine.view(rows, -1, heads, spec.num_heads // heads, dim).transpose(1, 2)
        k, v = (part.view(rows, -1, heads, dim).transpose(1, 2) for part in _gather(kv, self.slots, q.dtype))
        answer = _softmax_attention(mine.flatten(2, 3), k, v, self.mask, spec).view(mine.shape)
        answer = answer.transpose(1, 2).reshape(-1, *q.shape[1:])
        if self.tokens is None:
            out.copy_(answer)
        else:
            out.index_copy_(0, self.tokens, answer)


@attrs.frozen(eq=False)
class _Long:
    """One row. begin: its first token in S; slots [X]; blocks: (queries, keys, mask), mask None for plain causal."""

    begin: int
    slots: Tensor
    blocks: tuple[tuple[slice, slice, Tensor | None], ...]

    def attend(self, q: Tensor, kv: LayerKV, spec: AttentionSpec, out: Tensor) -> None:
        group = spec.num_heads // spec.num_kv_heads
        # [Hkv, G, X, D]: the heads of a group share their keys by a stride of zero
        k, v = (part.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for part in _gather(kv, self.slots, q.dtype))
        for queries, keys, mask in self.blocks:
            place = slice(self.begin + queries.start, self.begin + queries.stop)
            mine = q[place].unflatten(1, (spec.num_kv_heads, group)).permute(1, 2, 0, 3)
            answer = _softmax_attention(mine, k[:, :, keys], v[:, :, keys], mask, spec)
            out[place] = answer.permute(2, 0, 1, 3).flatten(1, 2)


def paged_attention(q: Tensor, batch: AttentionBatch, kv: LayerKV, spec: AttentionSpec) -> Tensor:
    """Attend every token to its row's cached keys and values, its own included.

    Args:
        q: [S, Hq, D]; keys and values of all S tokens are already written.
    Returns:
        [S, Hq * D] in q's dtype.
    """
    group_size = spec.num_heads // spec.num_kv_heads
    pieces = batch.memo((kv.group, group_size, q.dtype), lambda: tuple(_plan(batch, kv.group, group_size, q.dtype)))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for piece in pieces:
        piece.attend(q, kv, spec, out)
    return out.flatten(1)


def _gather(kv: LayerKV, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keys and values [X, Hkv, D] of the slots."""
    k, v = kv.k.index_select(0, slots), kv.v.index_select(0, slots)
    if kv.k_scale is None or kv.v_scale is None:
        return k, v
    k_scale, v_scale = kv.k_scale.index_select(0, slots), kv.v_scale.index_select(0, slots)
    return (k.float() * k_scale[..., None]).to(dtype), (v.float() * v_scale[..., None]).to(dtype)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec) -> Tensor:
    """Attend 4-D q to k and v. `mask` is added to the scores; None means query i sees keys up to i."""
    if spec.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=spec.scale)
    scores = (q @ k.transpose(-1, -2)).float() * spec.scale
    scores = (scores / spec.softcap).tanh() * spec.softcap
    if mask is None:
        mask = torch.full(scores.shape[-2:], -torch.inf, device=q.device).triu(1)
    return (scores + mask).softmax(-1).to(v.dtype) @ v


def _plan(batch: AttentionBatch, group: int, group_size: int, dtype: torch.dtype) -> Iterable[_Short | _Long]:
    """Sort the rows into pieces."""
    requires_host_sync("paged_attention")
    window = batch.layout.groups[group].window
    short: dict[tuple[int, int], list[int]] = {}
    begin = 0
    for row, (start, count) in enumerate(zip(batch.starts, batch.counts, strict=True)):
        if count > SHORT_TOKENS:
            yield _plan_long(batch, group, row, begin, dtype)
        else:
            length = start + count if window is None else min(start + count, window + count - 1)
            bucket = max(MIN_BUCKET, 1 << (length - 1).bit_length())
            short.setdefault((count, bucket), []).append(row)
        begin += count
    for (count, bucket), rows in short.items():
        step = max(1, PIECE_KEYS // bucket)
        for i in range(0, len(rows), step):
            yield _plan_short(batch, group, rows[i : i + step], count, group_size, dtype)


def _plan_short(
    batch: AttentionBatch, group: int, rows: list[int], count: int, group_size: int, dtype: torch.dtype
) -> _Short:
    window = batch.layout.groups[group].window
    index = torch.tensor(rows, device=batch.device)
    ends = batch.context_lens[index].to(torch.int64)[:, None]
    firsts = (ends - count - window + 1).clamp_min(0) if window else torch.zeros_like(ends)
    longest = max(batch.starts[row] + count for row in rows)
    keys = firsts + torch.arange(min(longest, window + count - 1) if window else longest, device=batch.device)
    queries = (ends - count + torch.arange(count, device=batch.device))[:, :, None]
    visible = keys[:, None] <= queries
    if window:
        visible &= keys[:, None] > queries - window
    mask = _additive(visible, dtype)[:, None]
    tokens = None
    if len(rows) < len(batch.counts):
        tokens = (batch.cu_q[index].to(torch.int64)[:, None] + torch.arange(count, device=batch.device)).flatten()
    return _Short(
        tokens,
        len(rows),
        _slots(batch, group, index[:, None], keys.minimum(ends - 1)).flatten(),
        mask if count == 1 else mask.repeat_interleave(group_size, dim=2),
    )


def _plan_long(batch: AttentionBatch, group: int, row: int, begin: int, dtype: torch.dtype) -> _Long:
    window = batch.layout.groups[group].window
    start, count = batch.starts[row], batch.counts[row]
    first = max(0, start - window + 1) if window else 0
    keys = torch.arange(first, start + count, device=batch.device)
    slots = _slots(batch, group, torch.tensor(row, device=batch.device), keys)
    if start == 0 and (window is None or count <= window):
        return _Long(begin, slots, ((slice(0, count), slice(0, count), None),))
    blocks: list[tuple[slice, slice, Tensor | None]] = []
    for i in range(0, count, QUERY_BLOCK):
        queries = slice(i, min(i + QUERY_BLOCK, count))
        seen = slice(max(0, start + i - window + 1) - first if window else 0, start + queries.stop - first)
        positions = torch.arange(start + queries.start, start + queries.stop, device=batch.device)[:, None]
        visible = keys[seen] <= positions
        if window:
            visible &= keys[seen] > positions - window
        blocks.append((queries, seen, _additive(visible, dtype)))
    return _Long(begin, slots, tuple(blocks))


def _slots(batch: AttentionBatch, group: int, rows: Tensor, positions: Tensor) -> Tensor:
    tokens = batch.layout.groups[group].block_size
    return batch.tables[group][rows, positions // tokens].to(torch.int64) * tokens + positions % tokens


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
