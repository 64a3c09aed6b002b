"""From an EngineConfig to a model that runs: find the checkpoint, check it against the config, read it.

Checking comes before reading: the model is first built from the files' headers alone, on torch's meta device, so
that all that is missing, unexpected or misshapen is one error after milliseconds and the bytes are known
before any memory is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import attrs
import torch
from torch import Tensor

from trio_llm.config import EngineConfig
from trio_llm.messages import Progress
from trio_llm.model.attention import AttentionBatch
from trio_llm.model.config import ModelConfig
from trio_llm.model.kv_cache import AttentionSpec, KVCache, KVLayout


class Model(Protocol):
    """What every family offers the runner. Call inside torch.inference_mode()."""

    specs: tuple[AttentionSpec, ...]
    vocab_size: int
    hidden_size: int

    def forward(self, batch: AttentionBatch, kv: KVCache) -> Tensor:
        """Run the layers; write keys and values of all S tokens; return [S, H], after the final norm."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] float32 for hidden rows [R, H]."""
        ...


@attrs.frozen(kw_only=True)
class ModelPlan:
    """A checkpoint that was checked but not read.

    Attributes:
        directory: Where the files are.
        architecture: As in config.json.
        dtype: Of weights and activations.
        weight_bytes: What the weights will take once loaded (after quantisation).
        max_model_len: The model's own limit, from config.json.
        eos_token_ids: From generation_config.json, else config.json, the primary one first.
        default_sampling: temperature, top_k, top_p, repetition_penalty where generation_config.json gives them.
        skipped: Prefixes of tensors of other towers in a multimodal checkpoint -> how many tensors.
    """

    directory: Path
    architecture: str
    config: ModelConfig
    dtype: torch.dtype
    kv_layout: KVLayout
    weight_bytes: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, float | int]
    skipped: Mapping[str, int]


@attrs.frozen(kw_only=True)
class LoadedModel:
    """A model in memory and what was known before it was read."""

    model: Model
    plan: ModelPlan

    @property
    def kv_layout(self) -> KVLayout:
        return self.plan.kv_layout


def inspect_model(config: EngineConfig, dtype: torch.dtype | None = None) -> ModelPlan:
    """Check a checkpoint's config and headers without reading weights.

    Args:
        config: Of it: model (a directory, or a hub id), load_format, block_size, kv_quantization, quantization.
        dtype: None for the checkpoint's own (or config.dtype where that is not auto).
    Raises:
        CheckpointError: The files do not fit together; lists everything that is wrong.
        UnsupportedError: A family, rope type or quantisation that is not here, by name.
    """
    raise NotImplementedError


def load_model(
    config: EngineConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    report: Callable[[Progress], None] | None = None,
) -> LoadedModel:
    """Read the weights onto `device`. `inspect_model` runs first and raises what it raises.

    Raises:
        CheckpointError: Also for weights that are NaN or infinite.
    """
    raise NotImplementedError
