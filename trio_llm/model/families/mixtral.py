"""Mixtral, as a difference from Mistral: the feed-forward is the best two of eight experts."""

from __future__ import annotations

from trio_llm.model.checkpoint.weights import Weights
from trio_llm.model.families.layers import ACTIVATIONS, MAX_EXPERTS, FeedForward, SparseMLP
from trio_llm.model.families.mistral import Mistral


class Mixtral(Mistral):
    """Experts are chosen by softmax over all, then the top ones renormalised."""

    def make_mlp(self, weights: Weights) -> FeedForward:
        num_experts = self.config.get_int("num_local_experts", maximum=MAX_EXPERTS)
        mlp = SparseMLP(
            weights.at("block_sparse_moe"),
            ("w1", "w3", "w2"),
            self.hidden_size,
            self.config.get_int("intermediate_size"),
            self.config.choice("hidden_act", ACTIVATIONS, "silu"),
            num_experts=num_experts,
            top_k=self.config.get_int("num_experts_per_tok", maximum=num_experts),
        )
        self.experts.append(mlp.experts)
        return mlp
