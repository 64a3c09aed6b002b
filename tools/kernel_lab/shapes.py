"""The models whose shapes are measured: the smallest and the largest that one GPU serves at full speed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Shape:
    """A decoder's sizes.

    Attributes:
        architecture: As in config.json.
        group: Query heads per key head.
        tied: The head is the embedding.
    """

    architecture: str
    hidden: int
    width: int
    layers: int
    head_dim: int
    kv_heads: int
    group: int
    vocab: int
    tied: bool

    @property
    def config(self) -> dict[str, Any]:
        """config.json, of which the bounds on context are left out."""
        return {
            "architectures": [self.architecture], "hidden_size": self.hidden, "intermediate_size": self.width,
            "num_hidden_layers": self.layers, "num_attention_heads": self.kv_heads * self.group,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        }  # fmt: skip

    def linears(self) -> Iterator[tuple[str, int, int, bool]]:
        """Yield name, inputs, outputs and whether the outputs are a gate and what it is multiplied by."""
        heads = self.kv_heads * self.group * self.head_dim
        yield "gate and up", self.hidden, 2 * self.width, True
        yield "down", self.width, self.hidden, False
        yield "qkv", self.hidden, heads + 2 * self.kv_heads * self.head_dim, False
        yield "o", heads, self.hidden, False
        yield "head", self.hidden, self.vocab, False


MODELS = {
    "Qwen2.5-0.5B": Shape(architecture="Qwen2ForCausalLM", hidden=896, width=4864, layers=24, head_dim=64, kv_heads=2,
                          group=7, vocab=151936, tied=True),
    "Qwen3-8B": Shape(architecture="Qwen3ForCausalLM", hidden=4096, width=12288, layers=36, head_dim=128, kv_heads=8,
                      group=4, vocab=151936, tied=False),
}  # fmt: skip
# What the simulator can run.
SMALL = {"small": Shape(architecture="Qwen2ForCausalLM", hidden=64, width=64, layers=1, head_dim=64, kv_heads=1,
                        group=2, vocab=48, tied=True)}  # fmt: skip
