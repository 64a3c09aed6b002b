"""The seam between models and kernels: every operation that may have a faster implementation.

Layers call these names and nothing else. On a CPU all of them are the torch reference, which defines what any other
implementation must compute. On a GPU each call goes to a CUDA kernel where one takes these arguments; where none does,
the reference runs there too: said once in the log, counted in `dispatched`, never silent. TRIO_LLM_KERNELS decides:
auto (that), cuda (what no kernel takes is an error) or reference.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from types import ModuleType
from typing import Any

from torch import Tensor

from trio_llm.errors import ConfigError, UnsupportedError
from trio_llm.model import attention_torch, ops_torch
from trio_llm.model.attention import AttentionBatch
from trio_llm.model.kv_cache import AttentionSpec, LayerKV
from trio_llm.model.ops_torch import Activation, Dense, Experts, Int8, Matrix, embedding
from trio_llm.model.rope import Rope

__all__ = [
    "Activation",
    "Dense",
    "Experts",
    "Int8",
    "Matrix",
    "act_and_mul",
    "add_rms_norm",
    "dispatched",
    "embedding",
    "gated_linear",
    "linear",
    "moe",
    "paged_attention",
    "rms_norm",
    "route",
    "write_kv",
]

_log = logging.getLogger(__name__)
_MODES = ("auto", "cuda", "reference")

# (operation, "cuda" or "reference", why not a kernel or "") -> calls on a GPU so far.
dispatched: Counter[tuple[str, str, str]] = Counter()


def _mode() -> str:
    mode = os.environ.get("TRIO_LLM_KERNELS", "auto")
    if mode not in _MODES:
        raise ConfigError("TRIO_LLM_KERNELS", mode, "environment", f"one of {', '.join(_MODES)}")
    return mode


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _choose(op: str, x: Tensor, *args: Any) -> ModuleType | None:
    """Return the module of kernels where one takes this call, else None."""
    if not _on_gpu(x):
        return None
    mode = _mode()
    if mode == "reference":
        return None
    from trio_llm.model import ops_cuda

    reason = ops_cuda.WHY_NOT[op](x, *args)
    key = (op, "cuda" if reason is None else "reference", reason or "")
    dispatched[key] += 1
    if reason is None:
        return ops_cuda
    if mode == "cuda":
        raise UnsupportedError(f"TRIO_LLM_KERNELS=cuda: no kernel does {op} with {reason}")
    if dispatched[key] == 1:
        _log.warning("no kernel does %s with %s: the torch reference runs", op, reason)
    return None


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """Return x [S, K] times the matrix's transpose, [S, N], plus its bias."""
    return (_choose("linear", x, matrix) or ops_torch).linear(x, matrix)


def gated_linear(x: Tensor, gate_up: Matrix, kind: Activation) -> Tensor:
    """Return act(gate) * up [S, I], the two products of x [S, K] with a matrix [2I, K], gate first."""
    kernels = _choose("gated_linear", x, gate_up)
    return kernels.gated_linear(x, gate_up, kind) if kernels else act_and_mul(linear(x, gate_up), kind)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square (in float32), then scale it by `weight`."""
    return (_choose("rms_norm", x) or ops_torch).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual)."""
    return (_choose("add_rms_norm", x) or ops_torch).add_rms_norm(x, residual, weight, eps)


def act_and_mul(gate_up: Tensor, kind: Activation) -> Tensor:
    """Return act(gate) * up for gate_up [S, 2I], gate first."""
    return (_choose("act_and_mul", gate_up) or ops_torch).act_and_mul(gate_up, kind)


def write_kv(
    qkv: Tensor,
    batch: AttentionBatch,
    kv: LayerKV,
    spec: AttentionSpec,
    rope: Rope,
    *,
    qk_norm: Tensor | None = None,
    v_norm: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """Normalise and rotate q and k, write k and v into their slots, and return q: see `ops_torch.write_kv`."""
    implementation = _choose("write_kv", qkv, kv) or ops_torch
    return implementation.write_kv(qkv, batch, kv, spec, rope, qk_norm=qk_norm, v_norm=v_norm, eps=eps)


def paged_attention(q: Tensor, batch: AttentionBatch, kv: LayerKV, spec: AttentionSpec) -> Tensor:
    """Attend every token to its row's cached keys and values: see `attention_torch.paged_attention`."""
    return (_choose("paged_attention", q, batch, kv) or attention_torch).paged_attention(q, batch, kv, spec)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts from logits [S, E]: weights and ids [S, top_k]; see `ops_torch.route`."""
    return (_choose("route", logits, top_k) or ops_torch).route(logits, top_k)


def moe(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts, kind: Activation) -> Tensor:
    """Run each token of x [S, H] through its experts and add up: see `ops_torch.moe`."""
    return (_choose("moe", x, experts) or ops_torch).moe(x, weights, ids, experts, kind)
