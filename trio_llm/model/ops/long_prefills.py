"""Attention of long prefills by torch's FlashAttention, on GPUs where that is faster than our kernel.

It reads dense keys, so those of a sequence are gathered from their blocks first. From how many tokens of a sequence in
a step on that pays is measured at start (`loading/prefill_choice.py`); what was not measured is our kernel's. Never
here: decodes and drafts, 8-bit caches, softcaps, contexts longer than the layer's window, and captured batches, of
which the host knows no lengths.

Letters: S tokens, T of one sequence in this step, X of its context, Hq/Hkv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import add

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from trio_llm.model.paged.attention_batch import AttentionBatch
from trio_llm.model.paged.kv_cache import AttentionSpec, LayerKV

# Keys and values that are gathered at a time: a longer context is our kernel's. A guess; it is memory the pool lacks.
MOST_GATHERED_BYTES = 256 * 2**20


@attrs.frozen
class Shape:
    """What decides which of the two is faster, besides the lengths."""

    device: torch.device
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, q: Tensor, spec: AttentionSpec) -> Shape:
        return cls(q.device, spec.num_heads, spec.num_kv_heads, spec.head_dim, q.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's key and value."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


# Tokens of a sequence in a step from which torch is faster; what is missing is always our kernel's.
limits: dict[Shape, int] = {}


@attrs.frozen(eq=False)
class Part:
    """Neighbouring rows of a step, as one layer sees them: a long prefill alone, or others.

    Attributes:
        tokens: Where theirs are in S.
        tables, context_lens, cu_q: Their part of the batch's; cu_q still counts from the step's first token.
        max_q, max_context: Bounds on tokens of this step and on context over these rows.
    """

    is_long: bool
    tokens: slice
    tables: Tensor
    context_lens: Tensor
    cu_q: Tensor
    max_q: int
    max_context: int


def gathered_bytes(longest_context: int) -> int:
    """Return the most memory that gathering takes for any shape that has a limit."""
    return max((min(MOST_GATHERED_BYTES, longest_context * shape.token_bytes) for shape in limits), default=0)


def parts_of(q: Tensor, batch: AttentionBatch, kv: LayerKV, spec: AttentionSpec) -> tuple[Part, ...]:
    """Cut a step into what torch attends for and what our kernel does; one part if all of it is our kernel's."""
    return batch.memo(("parts", kv.group, spec.num_heads, spec.softcap), lambda: tuple(_parts(q, batch, kv, spec)))


def _parts(q: Tensor, batch: AttentionBatch, kv: LayerKV, spec: AttentionSpec) -> Iterable[Part]:
    shape, group = Shape.of(q, spec), kv.group
    limit = limits.get(shape) if batch.counts else None  # captured batches have no counts
    if limit is None or batch.max_q < limit or kv.k.dtype != q.dtype or spec.softcap is not None:
        tokens, table = slice(0, len(q)), batch.tables[group]
        return [Part(False, tokens, table, batch.context_lens, batch.cu_q, batch.max_q, batch.max_context)]
    most = min(MOST_GATHERED_BYTES // shape.token_bytes, spec.window or batch.max_context)
    return _cut(batch, group, limit, most)


def _cut(batch: AttentionBatch, group: int, limit: int, most_context: int) -> Iterator[Part]:
    contexts = list(map(add, batch.starts, batch.counts))
    long = [count >= limit and context <= most_context for count, context in zip(batch.counts, contexts, strict=True)]
    token = 0
    for _, neighbours in groupby(range(len(long)), lambda row: row if long[row] else -1):
        numbers = list(neighbours)
        rows = slice(numbers[0], numbers[-1] + 1)
        tokens = slice(token, token := token + sum(batch.counts[rows]))
        yield Part(
            long[rows.start], tokens, batch.tables[group][rows], batch.context_lens[rows],
            batch.cu_q[rows.start : rows.stop + 1], max(batch.counts[rows]), max(contexts[rows]),
        )  # fmt: skip


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, blocks: Tensor, context: int, size: int, scale: float
) -> Tensor:
    """Attend the last T tokens of one sequence to its cached keys and values up to themselves.

    Args:
        q: [T, Hq, D].
        k_cache, v_cache: [slots, Hkv, D].
        blocks: [ceil(context / size)] int32, of `size` slots each.
    Returns:
        [T, Hq, D].
    """
    k, v = (_gather(cache, blocks, size)[:context] for cache in (k_cache, v_cache))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if q.is_cuda:
        # By its name: where `scaled_dot_product_attention` chooses, it takes cuDNN on Hopper, which plans each new
        # length for hundreds of milliseconds, or writes down all scores. Here causal means up to the last key.
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out = flash(q, k, v, 0.0, True, scale=scale)[0]
    else:
        mask = torch.ones(q.shape[2], context, dtype=torch.bool).tril(context - q.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _gather(cache: Tensor, blocks: Tensor, size: int) -> Tensor:
    return cache.unflatten(0, (-1, size)).index_select(0, blocks).flatten(0, 1)
