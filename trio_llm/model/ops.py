"""The seam between models and kernels: every operation that may have a faster implementation.

Layers call these names and nothing else. The torch reference defines what any other implementation must compute;
`dispatch` says which one runs.
"""

from __future__ import annotations

from torch import Tensor

from trio_llm.model import attention_torch, ops_torch
from trio_llm.model.attention import AttentionBatch
from trio_llm.model.dispatch import choose
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
    "embedding",
    "gated_linear",
    "linear",
    "moe",
    "paged_attention",
    "quantize_rows",
    "rms_norm",
    "route",
    "write_kv",
]


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """Return x [S, K] times the matrix's transpose, [S, N], plus its bias."""
    return (choose("linear", x, matrix) or ops_torch).linear(x, matrix)


def gated_linear(x: Tensor, gate_up: Matrix, kind: Activation) -> Tensor:
    """Return act(gate) * up [S, I], the two products of x [S, K] with a matrix [2I, K], gate first."""
    kernels = choose("gated_linear", x, gate_up)
    return kernels.gated_linear(x, gate_up, kind) if kernels else act_and_mul(linear(x, gate_up), kind)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square (in float32), then scale it by `weight`."""
    return (choose("rms_norm", x) or ops_torch).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual)."""
    return (choose("add_rms_norm", x) or ops_torch).add_rms_norm(x, residual, weight, eps)


def act_and_mul(gate_up: Tensor, kind: Activation) -> Tensor:
    """Return act(gate) * up for gate_up [S, 2I], gate first."""
    return (choose("act_and_mul", gate_up) or ops_torch).act_and_mul(gate_up, kind)


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
    implementation = choose("write_kv", qkv, kv) or ops_torch
    return implementation.write_kv(qkv, batch, kv, spec, rope, qk_norm=qk_norm, v_norm=v_norm, eps=eps)


def paged_attention(q: Tensor, batch: AttentionBatch, kv: LayerKV, spec: AttentionSpec) -> Tensor:
    """Attend every token to its row's cached keys and values: see `attention_torch.paged_attention`."""
    return (choose("paged_attention", q, batch, kv) or attention_torch).paged_attention(q, batch, kv, spec)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts from logits [S, E]: weights and ids [S, top_k]; see `ops_torch.route`."""
    return (choose("route", logits, top_k) or ops_torch).route(logits, top_k)


def moe(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts, kind: Activation) -> Tensor:
    """Run each token of x [S, H] through its experts and add up: see `ops_torch.moe`."""
    return (choose("moe", x, experts) or ops_torch).moe(x, weights, ids, experts, kind)


def quantize_rows(dense: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Write dense [N, K] into weight [N, K] int8 and scale [N], one per output channel."""
    (choose("quantize_rows", dense) or ops_torch).quantize_rows(dense, weight, scale)
