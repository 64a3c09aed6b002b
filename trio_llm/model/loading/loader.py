"""From an EngineConfig to a loaded model: find the checkpoint, check it against the config, read it.

The model is first built from the files' headers alone, on torch's meta device. So one error lists every missing,
unexpected or misshapen tensor after milliseconds, and the sizes are known before memory is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import attrs
import torch
from torch import Tensor

from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError
from trio_llm.gguf.header import is_gguf
from trio_llm.model.checkpoint.gguf import open_gguf
from trio_llm.model.checkpoint.hub import resolve_model
from trio_llm.model.checkpoint.safetensors import open_checkpoint
from trio_llm.model.checkpoint.tensors import Checkpoint, FileSource, HeaderSource
from trio_llm.model.checkpoint.weights import RandomSource, Weights
from trio_llm.model.config import TORCH_DTYPES, ModelConfig
from trio_llm.model.families.registry import find_family
from trio_llm.model.loading.freed_memory import returned_at_once
from trio_llm.model.ops.matrices import Keeps, keeps_integers
from trio_llm.model.paged.attention_batch import AttentionBatch
from trio_llm.model.paged.kv_cache import AttentionSpec, KVCache, KVLayout, plan_kv
from trio_llm.model.paged.rope import Rope
from trio_llm.model.parallel.group import Group
from trio_llm.model_files import read_optional_json
from trio_llm.model_info import Progress

# As for requests, see trio_llm.engine.admission.
_SAMPLING: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "at least 0"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "above 0"),
}


class Model(Protocol):
    """The interface of every model family, with a spec and a rope per layer. Call inside torch.inference_mode()."""

    specs: tuple[AttentionSpec, ...]
    ropes: Sequence[Rope]
    vocab_size: int
    hidden_size: int

    def forward(self, batch: AttentionBatch, kv: KVCache) -> Tensor:
        """Run the layers; write keys and values of all S tokens; return [S, H], after the final norm."""
        ...

    def expert_load(self) -> Tensor | None:
        """Return [L, E] int64, tokens each expert of each sparse layer has received so far; None without experts."""
        ...

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return [R, V] float32 for hidden rows [R, H], in `out` if given; on ranks other than 0, only their part."""
        ...


@attrs.frozen(kw_only=True)
class ModelPlan:
    """A checked checkpoint whose weights are not read yet.

    Attributes:
        engine: The settings that it was checked against.
        path: The directory, or the GGUF file.
        checkpoint: The tensors in the files; None for random weights.
        architecture: As in config.json.
        dtype: Of weights and activations.
        group: The ranks that share the model. Connect it before the model runs.
        weight_bytes: Bytes of the loaded weights of this rank, after quantisation.
        loading_bytes: The most that the host needs beside them while they are read and packed.
        as_stored: Whether quantised weights are computed as stored where the kernels can.
        keeps: Which ones these are.
        stored_formats: Format -> bytes that this rank will read from files.
        kept_formats: Of these, format -> bytes of what is computed as stored.
        max_model_len: The model's own limit, from config.json.
        eos_token_ids: From generation_config.json, then config.json.
        default_sampling: temperature, top_k, top_p, repetition_penalty, as far as generation_config.json has them.
    """

    engine: EngineConfig
    path: Path
    checkpoint: Checkpoint | None
    architecture: str
    config: ModelConfig
    dtype: torch.dtype
    group: Group
    kv_layout: KVLayout
    weight_bytes: int
    loading_bytes: int
    as_stored: bool
    keeps: Keeps
    stored_formats: Mapping[str, int]
    kept_formats: Mapping[str, int]
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, float | int]

    @property
    def stored_bytes(self) -> int:
        """Bytes to read from files."""
        return sum(self.stored_formats.values())

    @property
    def weight_format(self) -> str:
        """What matrices that are not kept as stored are computed in."""
        return "int8" if self.engine.quantization else str(self.dtype).removeprefix("torch.")

    @property
    def skipped(self) -> Mapping[str, int]:
        """Prefix of another tower in a multimodal checkpoint -> number of tensors."""
        return self.checkpoint.skipped if self.checkpoint else {}


@attrs.frozen(kw_only=True)
class LoadedModel:
    """A model in memory and its plan."""

    model: Model
    plan: ModelPlan

    @property
    def kv_layout(self) -> KVLayout:
        return self.plan.kv_layout


def load_model(plan: ModelPlan, device: torch.device, report: Callable[[Progress], None] | None = None) -> LoadedModel:
    """Read the weights of a checked checkpoint onto `device`.

    Raises:
        CheckpointError: A tensor is NaN or infinite, or a file has changed.
    """
    family = find_family(plan.architecture)
    quantize, exact = _int8_of(plan.engine)
    if plan.checkpoint is None:
        weights = Weights(RandomSource(plan.engine.seed), plan.dtype, device, quantize, exact=exact, group=plan.group)
        return LoadedModel(model=family(plan.config.text, weights), plan=plan)
    with FileSource(plan.checkpoint, plan.stored_bytes, report) as source, returned_at_once():
        weights = Weights(
            source, plan.dtype, device, quantize, plan.as_stored, exact=exact, group=plan.group, keeps=plan.keeps
        )
        model = family(plan.config.text, weights)
    return LoadedModel(model=model, plan=plan)


def inspect_model(
    engine: EngineConfig,
    dtype: torch.dtype | None = None,
    *,
    as_stored: bool = False,
    keeps: Keeps = keeps_integers,
    rank: int = 0,
) -> ModelPlan:
    """Check a checkpoint's config and headers without reading weights.

    Args:
        engine: Uses model, revision, dtype, load_format, block_size, kv_quantization, kv_cache_dtype,
            quantization, tensor_parallel_size.
        rank: Whose part of the model to plan.
        dtype: Overrides engine.dtype. None means engine.dtype, or the checkpoint's if that is auto.
        as_stored, keeps: As in ModelPlan.
    Raises:
        CheckpointError: The files do not fit together; lists every mismatch.
        UnsupportedError: A family, rope type or quantisation that is not supported; names it.
        ConfigError: The ranks do not divide the model.
    """
    path = resolve_model(engine.model, engine.revision)
    config, generation, checkpoint = open_gguf(path) if is_gguf(path) else _open_directory(path, engine.load_format)
    architecture = _architecture(config)
    family = find_family(architecture)
    dtype = dtype or (config.dtype() if engine.dtype == "auto" else TORCH_DTYPES[engine.dtype])
    checkpoint = None if engine.load_format == "dummy" else checkpoint
    headers = HeaderSource(checkpoint)
    group = Group(rank, engine.tensor_parallel_size)
    weights = Weights(headers, dtype, torch.device("meta"), _int8_of(engine)[0], as_stored, group=group, keeps=keeps)
    model = family(config.text, weights)
    headers.check(path, model.is_ignored)
    return ModelPlan(
        engine=engine,
        path=path,
        checkpoint=checkpoint,
        architecture=architecture,
        config=config,
        dtype=dtype,
        group=group,
        kv_layout=plan_kv(model.specs, block_size=engine.block_size, dtype=_kv_dtype(engine, dtype)),
        weight_bytes=weights.tally.nbytes,
        loading_bytes=weights.tally.made_of + headers.scratch_bytes,
        as_stored=as_stored,
        keeps=keeps,
        stored_formats=headers.stored_bytes,
        kept_formats=headers.kept_bytes,
        max_model_len=max_model_len(config.text),
        eos_token_ids=_eos_token_ids(generation, config),
        default_sampling=_default_sampling(generation),
    )


def _kv_dtype(engine: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    chosen = "int8" if engine.kv_quantization and engine.kv_cache_dtype == "auto" else engine.kv_cache_dtype
    return {"auto": dtype, "int8": torch.int8}.get(chosen, torch.float8_e4m3fn)


def _int8_of(engine: EngineConfig) -> tuple[bool, bool]:
    """Return whether matrices become int8, and whether activations stay as they are then."""
    return engine.quantization is not None, engine.quantization == "int8-weights"


def _quantization(config: ModelConfig) -> ModelConfig | None:
    """Return how the weights are quantised, None if they are not."""
    for part in (config, config.text):
        for key in filter(part.has, ("quantization_config", "compression_config")):
            return part.section(key)
    return None


def _architecture(config: ModelConfig) -> str:
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{config.source}: architectures is missing")
    return names[0]


def _open_directory(directory: Path, load_format: str) -> tuple[ModelConfig, ModelConfig, Checkpoint | None]:
    """Return config.json, generation_config.json (empty if there is none) and the checkpoint, unless it is a dummy."""
    config = ModelConfig.from_directory(directory)
    name = "generation_config.json"
    generation = ModelConfig(read_optional_json(directory, name), str(directory / name))
    if load_format == "dummy":
        return config, generation, None
    return (
        config,
        generation,
        open_checkpoint(directory, multimodal=config.has("text_config"), quantization=_quantization(config)),
    )


def _eos_token_ids(generation: ModelConfig, config: ModelConfig) -> tuple[int, ...]:
    sources = (generation, config, config.text)
    return tuple(dict.fromkeys(token_id for source in sources for token_id in source.token_ids("eos_token_id")))


def _default_sampling(generation: ModelConfig) -> dict[str, float | int]:
    """Return the checkpoint's recommended sampling, by the names of SamplingParams.

    Raises:
        CheckpointError: A value is not allowed: every request that leaves it out would be refused for it.
    """
    found: dict[str, float | int] = {}
    for key, (is_allowed, allowed) in _SAMPLING.items():
        if generation.has(key):
            found[key] = value = generation.get_float(key, above=-math.inf)
            if not is_allowed(value):
                raise CheckpointError(f"{generation.source}: {key} = {value}: must be {allowed}")
    if generation.has("top_k"):
        found["top_k"] = generation.get_int("top_k", minimum=-1)
    return found


def max_model_len(config: ModelConfig) -> int:
    """Return the longest context: YaRN multiplies the original one by its factor."""
    longest = config.get_int("max_position_embeddings")
    for key in ("rope_parameters", "rope_scaling"):
        if config.has(key):
            rope = config.section(key)
            if "yarn" in (rope.values.get("rope_type"), rope.values.get("type")):
                original = rope.get_int("original_max_position_embeddings", longest)
                longest = max(longest, int(original * rope.get_float("factor")))
    return longest
