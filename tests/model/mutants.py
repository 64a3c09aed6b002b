"""Break the models on purpose, one detail at a time, and see the golden comparison fail.

`python -m tests.model.mutants` prints a table: mutant, family, largest logit difference to transformers. A mutant that
stays under the tolerance would mean that the golden tests cannot see that mistake.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
from torch import Tensor

from tests.model.golden import FP32_TOLERANCE, Golden, make_golden, max_difference
from tests.model.paged import load
from trio_llm.errors import CheckpointError
from trio_llm.model.checkpoint.weights import Weights
from trio_llm.model.config import ModelConfig
from trio_llm.model.families import gemma4, mistral
from trio_llm.model.families.llama import Llama
from trio_llm.model.ops import seam as ops
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.paged import rope
from trio_llm.model.parallel.span import Span

CHUNK = 7
Wrap = Callable[[Any], Any]


@attrs.frozen
class Mutant:
    """An attribute of the models replaced by what `wrap` makes of it; `family` is where it must show."""

    family: str
    target: Any
    name: str
    wrap: Wrap

    def difference(self, golden: Golden) -> float:
        """Return the largest logit difference with the mutant in place; infinite where loading fails."""
        with ExitStack() as stack:
            original = self.target[self.name] if isinstance(self.target, dict) else getattr(self.target, self.name)
            changed = self.wrap(original)
            if isinstance(self.target, dict):
                stack.enter_context(mock.patch.dict(self.target, {self.name: changed}))
            else:
                stack.enter_context(mock.patch.object(self.target, self.name, changed))
            try:
                return max_difference(load(golden.directory), golden, CHUNK)
            except CheckpointError:
                return float("inf")


def result(change: Callable[[Any], Any]) -> Wrap:
    """Change what a function returns."""
    return lambda original: lambda *args, **options: change(original(*args, **options))


def option(name: str, value: Any) -> Wrap:
    """Call a function with another value of one keyword."""
    return lambda original: lambda *args, **options: original(*args, **{**options, name: value})


def weight(family: str, part: str, change: Callable[[Tensor], Tensor]) -> Mutant:
    """Change the weights whose name contains `part`."""

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        def fill(self: Weights, out: Tensor, name: str, *spans: Span) -> None:
            original(self, out, name, *spans)
            if part in self.prefix + name:
                out.copy_(change(out.clone()))

        return fill

    return Mutant(family, Weights, "_fill", wrap)


def setting(family: str, key: str, value: Any, *, kind: str) -> Mutant:
    """Read `value` wherever config.json is asked for `key`."""
    return Mutant(
        family,
        ModelConfig,
        f"get_{kind}",
        lambda original: (
            lambda self, asked, *args, **options: value if asked == key else original(self, asked, *args, **options)
        ),
    )


def window(family: str, module: Any, change: Callable[[int], int | None]) -> Mutant:
    """Give sliding layers another window."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def attention_spec(*args: Any, window: int | None = None, **options: Any) -> Any:
            return original(*args, window=window and change(window), **options)

        return attention_spec

    return Mutant(family, module, "attention_spec", wrap)


def swap_heads(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Pair query head h with KV head h % Hkv instead of h // G."""

    def paged_attention(q: Tensor, batch: Any, kv: Any, spec: Any) -> Tensor:
        order = torch.arange(spec.num_heads).view(spec.num_kv_heads, -1).T.flatten()
        return original(q[:, order], batch, kv, spec).view(q.shape)[:, order.argsort()].flatten(1)

    return paged_attention


def rotate_neighbours(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Rotate (0, 1), (2, 3), ... instead of the two halves."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        halves = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
        return original(halves, cos, sin).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    return rotate


def share_with_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let sharing layers read the first layer of their kind, not the last."""

    def make_spec(self: gemma4.Gemma4, layer: int) -> Any:
        return attrs.evolve(original(self, layer), kv_layer=layer if layer < 3 else self.types.index(self.types[layer]))

    return make_spec


def spread_over_rotated_part(_: object) -> Callable[..., rope.Rope]:
    """Take the rotated part's size, not the head's, for the denominator of proportional rope."""

    def proportional(params: Any, config: Any, theta: float, head_dim: int) -> rope.Rope:
        rotated = theta ** -(torch.arange(0, head_dim // 4, 2) / (head_dim // 4))
        return rope.Rope(torch.cat((rotated, torch.zeros(head_dim // 2 - len(rotated)))))

    return proportional


def swap_halves(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Take the second half for the gate."""
    return lambda gate_up, kind: original(gate_up.roll(gate_up.shape[-1] // 2, -1), kind)


def raw_top_k(_: object) -> Callable[..., Any]:
    """Weigh experts by their share of all, not of the chosen."""
    return lambda logits, top_k: logits.float().softmax(-1).topk(top_k, dim=-1)


E2B, A4B, G31B = "gemma4-e2b", "gemma4-26b", "gemma4-31b"
BIASED = "llama-biases-linear-rope"
MUTANTS = {
    "window one larger": window("mistral-window", mistral, lambda w: w + 1),
    "window one smaller": window("mistral-window", mistral, lambda w: w - 1),
    "window ignored": window("mistral-window", mistral, lambda _: None),
    "window one larger (Gemma)": window(E2B, gemma4, lambda w: w + 1),
    "GQA heads swapped": Mutant("qwen3", ops, "paged_attention", swap_heads),
    "rope on neighbours": Mutant("llama", ops_torch, "_rotate", rotate_neighbours),
    "rope backwards": Mutant("llama", ops_torch, "_rotate", lambda f: lambda x, cos, sin: f(x, cos, -sin)),
    "llama3 rope unscaled": Mutant("llama3-rope-gqa-tied", rope._KINDS, "llama3", lambda _: rope._default),
    "linear rope unscaled": Mutant(BIASED, rope._KINDS, "linear", lambda _: rope._default),
    "yarn without its factor": Mutant("llama-yarn", rope, "_yarn_factor", result(lambda _: 1.0)),
    "proportional rope over the rotated part": Mutant(G31B, rope._KINDS, "proportional", spread_over_rotated_part),
    "norm with 1 + w": weight("llama", "input_layernorm", lambda w: w + 1),
    "final norm with 1 + w": weight("qwen2", "model.norm", lambda w: w + 1),
    "q bias missing": weight("qwen2", "q_proj.bias", torch.zeros_like),
    "k bias missing": weight("qwen2", "k_proj.bias", torch.zeros_like),
    "v bias missing": weight("qwen2", "v_proj.bias", torch.zeros_like),
    "o bias missing": weight(BIASED, "o_proj.bias", torch.zeros_like),
    "MLP bias missing": weight(BIASED, "down_proj.bias", torch.zeros_like),
    "qk-norm missing": Mutant("qwen3", ops, "write_kv", option("qk_norm", None)),
    "q_norm with 1 + w": weight("qwen3", "q_norm", lambda w: w + 1),
    "experts not renormalised": Mutant("mixtral", ops, "route", raw_top_k),
    "experts not renormalised (Gemma)": Mutant(A4B, ops, "route", raw_top_k),
    "one expert too few": setting("mixtral", "num_experts_per_tok", 1, kind="int"),
    "per_expert_scale missing": weight(A4B, "per_expert_scale", torch.ones_like),
    "router.scale missing": weight(A4B, "router.scale", torch.ones_like),
    "softcap missing": Mutant(G31B, gemma4.Gemma4, "logits", lambda _: Llama.logits),
    "softcap twice as high": setting(G31B, "final_logit_softcapping", 10.0, kind="float"),
    "v_norm missing": Mutant(G31B, ops, "write_kv", option("v_norm", value=False)),
    "softmax scaled by 1/sqrt(D)": Mutant(G31B, gemma4, "attention_spec", option("scale", None)),
    "embedding not scaled": Mutant(G31B, ops, "embedding", result(lambda rows: rows / 48**0.5)),
    "layer_scalar missing": weight(G31B, "layer_scalar", torch.ones_like),
    "PLE without 1/sqrt(2)": Mutant(E2B, gemma4.Gemma4, "per_layer_embeddings", result(lambda own: own * 2**0.5)),
    "PLE of the next layer": Mutant(E2B, gemma4.Gemma4, "per_layer_embeddings", result(lambda own: own.roll(1, 1))),
    "sharing with the first layer": Mutant(E2B, gemma4.Gemma4, "make_spec", share_with_first),
    "shared layers with narrow MLP": setting(E2B, "use_double_wide_mlp", value=False, kind="bool"),
    "SiLU for GELU": Mutant(G31B, ops, "act_and_mul", lambda f: lambda x, _: f(x, "silu")),
    "gate and up swapped": Mutant("llama", ops, "act_and_mul", swap_halves),
}


def main() -> int:
    """Print the table; return how many mutants survive."""
    torch.set_num_threads(1)
    survivors = 0
    with tempfile.TemporaryDirectory() as directory:
        make = cache(lambda family: make_golden(family, Path(directory) / family))
        print("| mutant | family | max logit difference |\n|---|---|---|")  # noqa: T201 - a script
        for name, mutant in MUTANTS.items():
            difference = mutant.difference(make(mutant.family))
            survives = difference <= FP32_TOLERANCE
            survivors += survives
            print(f"| {name} | {mutant.family} | {difference:.2g}{' SURVIVES' * survives} |")  # noqa: T201
    return survivors


if __name__ == "__main__":
    sys.exit(main())
