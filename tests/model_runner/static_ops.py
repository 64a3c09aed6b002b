"""Attention and experts as one would write them for a graph: every size fixed, every decision left to the device.

What the torch reference does by Python's decisions, and only kernels do without, so that graphs can be tried on a CPU
with the models and dtypes that no kernel takes.

Letters: B rows of one token, X keys, Hq/Hkv heads, D head size, E experts, K chosen ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.ops.matrices import Activation, Dense, Experts, Matrix
from trio_llm.model.ops.torch_reference import linear
from trio_llm.model.paged.attention_batch import AttentionBatch
from trio_llm.model.paged.kv_cache import AttentionSpec, LayerKV


def paged_attention(q: Tensor, batch: AttentionBatch, kv: LayerKV, spec: AttentionSpec) -> Tensor:
    """See `attention_torch.paged_attention`; rows of one token, all keys up to the bound on the context."""
    size, window = batch.layout.groups[kv.group].block_size, spec.window
    last = batch.context_lens[:, None].long() - 1
    first = torch.zeros_like(last) if window is None else (last - window + 1).clamp_min(0)
    keys = torch.arange(batch.max_context, device=q.device)[None]
    seen = (keys >= first) & (keys <= last)
    keys = keys.maximum(first).minimum(last)  # never a slot that nobody wrote, nor one that left the window
    slots = batch.tables[kv.group].gather(1, keys // size).long() * size + keys % size
    k, v = _read(kv.k, kv.k_scale, slots), _read(kv.v, kv.v_scale, slots)
    groups = q.float().unflatten(1, (spec.num_kv_heads, -1))
    scores = torch.einsum("bhgd,bxhd->bhgx", groups, k) * spec.scale
    if spec.softcap is not None:
        scores = (scores / spec.softcap).tanh() * spec.softcap
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bhgx,bxhd->bhgd", weights, v).to(q.dtype).flatten(1)


def _read(cache: Tensor, scale: Tensor | None, slots: Tensor) -> Tensor:
    values = cache[slots].float()
    return values if scale is None else values * scale[slots][..., None]


def moe(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts, kind: Activation) -> Tensor:
    """See `ops_torch.moe`; every token through every expert."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(len(experts.load)):
        chosen = ids == expert
        gate_up, down = _of(experts.gate_up, expert), _of(experts.down, expert)
        answer = linear(ops_torch.act_and_mul(linear(x, gate_up), kind), down)
        out += torch.where(chosen, weights, 0).sum(1, keepdim=True) * answer
        experts.load[expert] += chosen.sum()
    return out.to(x.dtype)


def _of(matrix: Matrix, expert: int) -> Matrix:
    return Dense(matrix.weight[expert]) if isinstance(matrix, Dense) else ops_torch._expert(matrix, expert)
