"""Mixtral, as a difference from Mistral: the feed-forward is the best two of eight experts."""

from __future__ import annotations

from torch import Tensor

from trio_llm.model import ops
from trio_llm.model.attention import AttentionBatch
from trio_llm.model.layers import ACTIVATIONS, MAX_EXPERTS, FeedForward, make_experts
from trio_llm.model.mistral import Mistral
from trio_llm.model.weights import Weights


class Mixtral(Mistral):
    """Experts are chosen by softmax over all, then the top ones renormalised."""

    def make_mlp(self, weights: Weights) -> FeedForward:
        weights = weights.at("block_sparse_moe")
        config, hidden = self.config, self.hidden_size
        num_experts = config.get_int("num_local_experts", most=MAX_EXPERTS)
        top_k = config.get_int("num_experts_per_tok", most=num_experts)
        kind = config.choice("hidden_act", ACTIVATIONS, "silu")
        gate = weights.unquantized().matrix(["gate"], [num_experts], hidden)
        intermediate = config.get_int("intermediate_size")
        names = [f"experts.{i}." for i in range(num_experts)]
        experts = make_experts(
            weights.experts([(f"{n}w1.weight", f"{n}w3.weight") for n in names], [intermediate] * 2, hidden),
            weights.experts([(f"{n}w2.weight",) for n in names], [hidden], intermediate),
            num_experts,
            weights.device,
        )
        self.experts.append(experts)

        def mlp(x: Tensor, batch: AttentionBatch) -> Tensor:
            expert_weights, ids = ops.route(ops.linear(x, gate), top_k)
            return ops.moe(x, expert_weights, batch.without_padding(ids), experts, kind)

        return mlp
