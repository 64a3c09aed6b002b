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
from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.messages import Progress
from trio_llm.model.attention import AttentionBatch
from trio_llm.model.checkpoint import Checkpoint, FileSource, HeaderSource, open_checkpoint
from trio_llm.model.config import TORCH_DTYPES, ModelConfig, read_json
from trio_llm.model.hub import resolve_model
from trio_llm.model.kv_cache import AttentionSpec, KVCache, KVLayout, plan_kv
from trio_llm.model.registry import find_family
from trio_llm.model.weights import RandomSource, Weights


class Model(Protocol):
    """What every family offers the runner. Call inside torch.inference_mode()."""

    specs: tuple[AttentionSpec, ...]
    vocab_size: int
    hidden_size: int

    def forward(self, batch: AttentionBatch, kv: KVCache) -> Tensor:
        """Run the layers; write keys and values of all S tokens; return [S, H], after the final norm."""
        ...

    def expert_load(self) -> Tensor | None:
        """Return [L, E] int64, tokens each expert of each sparse layer has received so far; None without experts."""
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
        stored_bytes: What will be read from files.
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
    stored_bytes: int
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
        config: Of it: model (a directory, or a hub id), dtype, load_format, block_size, kv_quantization, quantization.
        dtype: Overrides config.dtype; None takes it, and the checkpoint's own where it is auto.
    Raises:
        CheckpointError: The files do not fit together; lists everything that is wrong.
        UnsupportedError: A family, rope type or quantisation that is not here, by name.
    """
    return _inspect(config, dtype)[0]


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
    plan, checkpoint = _inspect(config, dtype)
    family = find_family(plan.architecture)
    quantize = config.quantization == "int8"
    if checkpoint is None:
        weights = Weights(RandomSource(config.seed), plan.dtype, device, quantize)
        return LoadedModel(model=family(plan.config.text, weights), plan=plan)
    with FileSource(checkpoint, plan.stored_bytes, report) as source:
        model = family(plan.config.text, Weights(source, plan.dtype, device, quantize))
    return LoadedModel(model=model, plan=plan)


def _inspect(engine: EngineConfig, dtype: torch.dtype | None) -> tuple[ModelPlan, Checkpoint | None]:
    directory = resolve_model(engine.model)
    config = ModelConfig.from_directory(directory)
    architecture = _architecture(config)
    family = find_family(architecture)
    if dtype is None:
        dtype = config.dtype() if engine.dtype == "auto" else TORCH_DTYPES[engine.dtype]
    checkpoint = None
    if engine.load_format == "auto":
        checkpoint = open_checkpoint(directory, multimodal=config.has("text_config"))
    headers = HeaderSource(checkpoint)
    weights = Weights(headers, dtype, torch.device("meta"), engine.quantization == "int8")
    model = family(config.text, weights)
    headers.check(directory, model.is_ignored)
    generation = _generation_config(directory)
    plan = ModelPlan(
        directory=directory,
        architecture=architecture,
        config=config,
        dtype=dtype,
        kv_layout=plan_kv(
            model.specs, block_size=engine.block_size, dtype=torch.int8 if engine.kv_quantization else dtype
        ),
        weight_bytes=weights.tally.nbytes,
        stored_bytes=headers.stored_bytes,
        max_model_len=max_model_len(config.text),
        eos_token_ids=_eos_token_ids(generation, config),
        default_sampling=_default_sampling(generation),
        skipped=checkpoint.skipped if checkpoint else {},
    )
    return plan, checkpoint


def _architecture(config: ModelConfig) -> str:
    for part in (config, config.text):
        for key in filter(part.has, ("quantization_config", "compression_config")):
            method = part.section(key).values.get("quant_method", "unknown")
            raise UnsupportedError(
                f"{part.source}: the weights are already quantised ({method!r}); load the original checkpoint, "
                "and --quantization int8 to quantise it here"
            )
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{config.source}: architectures is missing")
    return names[0]


def _generation_config(directory: Path) -> ModelConfig:
    path = directory / "generation_config.json"
    return ModelConfig(read_json(path) if path.exists() else {}, str(path))


def _eos_token_ids(generation: ModelConfig, config: ModelConfig) -> tuple[int, ...]:
    for source in (generation, config, config.text):
        if ids := source.token_ids("eos_token_id"):
            return ids
    return ()


def _default_sampling(generation: ModelConfig) -> dict[str, float | int]:
    """Return what the checkpoint recommends, by the names of SamplingParams."""
    found: dict[str, float | int] = {}
    for key in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if generation.has(key):
            found[key] = generation.get_float(key)
    if generation.has("top_k"):
        found["top_k"] = generation.get_int("top_k", least=0)
    return found


def max_model_len(config: ModelConfig) -> int:
    """Return the longest context: YaRN stretches the original one by its factor."""
    longest = config.get_int("max_position_embeddings")
    for key in ("rope_parameters", "rope_scaling"):
        if config.has(key):
            rope = config.section(key)
            if "yarn" in (rope.values.get("rope_type"), rope.values.get("type")):
                original = rope.get_int("original_max_position_embeddings", longest)
                longest = max(longest, int(original * rope.get_float("factor")))
    return longest
