"""A module of kernels that has attention only: that of `ops/cuda.py`, whose kernel for other rows is torch's reference.

So the engine takes long prefills to torch in float32, on a CPU, with any head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_kernels import paged_attn
from tests.model.paged import make_batch
from tools.kernel_lab.attention import Problem
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops import long_prefills
from trio_llm.model.ops import torch_attention as attention_torch
from trio_llm.model.ops.matrices import keeps_integers
from trio_llm.model.paged.attention_batch import AttentionBatch, lay_out
from trio_llm.model.paged.kv_cache import AttentionSpec, LayerKV, plan_kv

NAME, LIBRARIES = ops_cuda.NAME, ops_cuda.LIBRARIES
WHY_NOT: Mapping[str, Any] = {"paged_attention": ops_cuda.WHY_NOT["paged_attention"]}
prepare, keeps, paged_attention = ops_cuda.prepare, keeps_integers, ops_cuda.paged_attention


class Always(dict[long_prefills.Shape, int]):
    """The same limit for every shape."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def get(self, *_: Any) -> Any:
        return self._tokens


@contextmanager
def long_from(tokens: int) -> Iterator[None]:
    """Let prefills be torch's from so many tokens on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_prefills, "limits", Always(tokens))
        yield


@contextmanager
def kernel_in_torch() -> Iterator[None]:
    """Let the reference be the kernel for other rows."""
    with pytest.MonkeyPatch.context() as patch:
        put_kernel_in_torch(patch)
        yield


def put_kernel_in_torch(patch: pytest.MonkeyPatch) -> None:
    """Let the reference be the kernel until `patch` is undone, which a test that patches it again uses too."""
    patch.setattr(paged_attn, "paged_attention", _attend)
    patch.setattr(paged_attn, "supports", lambda *_: None)


def layer_of(problem: Problem) -> tuple[AttentionBatch, LayerKV, AttentionSpec]:
    """Return a problem of the kernel as a step's batch, a layer's cache and how it attends."""
    case, device = problem.case, problem.q.device
    spec = AttentionSpec(
        num_heads=case.kv_heads * case.group, num_kv_heads=case.kv_heads, head_dim=case.head_dim,
        scale=case.head_dim**-0.5, kv_layer=0, window=case.window, softcap=case.softcap,
    )  # fmt: skip
    layout = plan_kv([spec], block_size=case.block_size, dtype=problem.k.dtype)
    counts = [tokens for tokens, _ in case.sequences]
    starts = [context - tokens for tokens, context in case.sequences]
    columns = [np.zeros(sum(counts), np.int64), *lay_out(np.array(starts), np.array(counts))]
    batch = AttentionBatch.of(
        [torch.from_numpy(column).to(device) for column in columns], starts, counts, [problem.tables], layout
    )
    return batch, LayerKV(0, problem.k, problem.v, problem.k_scale, problem.v_scale), spec


def _attend(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, tables: Tensor,
    context_lens: Tensor, cu_q: Tensor, *, block_size: int, scale: float, window: int | None, softcap: float | None,
    max_q: int, max_context: int, out: Tensor,
) -> None:  # fmt: skip
    """See `paged_attn.paged_attention`: write the tokens between the first and the last entry of cu_q, no others."""
    counts = cu_q.diff()
    assert (max_q, max_context) == (counts.max(), context_lens.max())
    heads = q.shape[1], k.shape[1], q.shape[2]
    spec = AttentionSpec(
        num_heads=heads[0], num_kv_heads=heads[1], head_dim=heads[2], scale=scale, kv_layer=0, window=window,
        softcap=softcap,
    )  # fmt: skip
    layout = plan_kv([spec], block_size=block_size, dtype=q.dtype)
    starts = (context_lens - counts).tolist()
    batch = make_batch([0] * int(counts.sum()), starts, counts.tolist(), [tables], layout)
    tokens = slice(int(cu_q[0]), int(cu_q[-1]))
    own = attention_torch.paged_attention(q[tokens], batch, LayerKV(0, k, v, k_scale, v_scale), spec)
    out[tokens] = own.view(-1, *q.shape[1:])
