"""The seam between models and kernels: every operation that may have a faster implementation.

Layers call these names and nothing else; today all of them are the torch reference, which defines what any other
implementation must compute.
"""

from trio_llm.model.attention_torch import paged_attention
from trio_llm.model.ops_torch import (
    Activation,
    Dense,
    Experts,
    Int8,
    Matrix,
    act_and_mul,
    add_rms_norm,
    embedding,
    linear,
    moe,
    rms_norm,
    route,
    write_kv,
)

__all__ = [
    "Activation",
    "Dense",
    "Experts",
    "Int8",
    "Matrix",
    "act_and_mul",
    "add_rms_norm",
    "embedding",
    "linear",
    "moe",
    "paged_attention",
    "rms_norm",
    "route",
    "write_kv",
]
