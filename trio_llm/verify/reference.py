"""The reference: transformers' model of a checkpoint, in float32 on the CPU.

Quantised weights and GGUF files are widened by trio-llm's own readers, which the tests hold to independent libraries;
transformers then computes with the same values. No code from a model's directory is run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trio_llm.errors import CheckpointError
from trio_llm.model.checkpoint.tensors import FLOATS, Checkpoint, QuantizedInfo
from trio_llm.model.loading.loader import ModelPlan

_SHARD_BYTES = 2**31


def library() -> Any:
    """Import transformers, and silence it. Raises CheckpointError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError("to compare with transformers, pip install 'trio-llm[verify]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class Reference:
    """Log-probabilities of whole sequences, computed without a cache."""

    def __init__(self, plan: ModelPlan) -> None:
        """Load the model. Raises CheckpointError if transformers cannot."""
        try:
            self._model = _load(plan, getattr(library(), plan.architecture))
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{plan.path}: transformers cannot load it: {error}") from error

    def logits(self, token_ids: list[int]) -> Tensor:
        """Return [tokens, V] float32."""
        with torch.inference_mode():
            return self._model(input_ids=torch.tensor([token_ids])).logits[0].float()


def _load(plan: ModelPlan, family: Any) -> Any:
    assert plan.checkpoint is not None
    if plan.path.is_dir() and all(
        info.dtype in FLOATS and not isinstance(info, QuantizedInfo) for info in plan.checkpoint.tensors.values()
    ):
        return family.from_pretrained(plan.path, dtype=torch.float32).eval()
    values = {key: value for key, value in plan.config.values.items() if not key.endswith("ion_config")}
    factors = _take_factors(values)
    with tempfile.TemporaryDirectory() as directory:
        family.config_class(**values).save_pretrained(directory)
        _write_widened(plan.checkpoint, Path(directory))
        model = family.from_pretrained(directory, dtype=torch.float32).eval()
    for name, buffer in model.named_buffers():
        if factors and name.endswith("inv_freq") and "sliding" not in name:
            buffer.div_(torch.tensor(factors))
    return model


def _take_factors(values: dict[str, Any]) -> list[float]:
    """Replace a GGUF file's factors of rope frequencies, which transformers does not know, by the default rope."""
    parameters = values.get("rope_parameters", {})
    scaled = parameters.get("full_attention", parameters)
    if scaled.get("rope_type") != "frequency_factors":
        return []
    plain = {"rope_type": "default", "rope_theta": scaled["rope_theta"]}
    values["rope_parameters"] = {**parameters, "full_attention": plain} if scaled is not parameters else plain
    return scaled["factors"]


def _write_widened(checkpoint: Checkpoint, directory: Path) -> None:
    """Write all tensors in float32, in shards, so that one shard at a time is in memory."""
    files: dict[str, str] = {}
    for number, shard in enumerate(_shards(checkpoint)):
        name = f"model-{number}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(checkpoint: Checkpoint) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    with closing(checkpoint.open()) as reader:
        for name, info in checkpoint.tensors.items():
            shard[name] = reader.read(info).float().contiguous()
            if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
                yield shard
                shard = {}
    yield shard
