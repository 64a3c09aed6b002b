"""From quantization_config to matrices: which format a checkpoint is in, and the tensors that belong together.

No list of unquantised layers is needed: their weights are stored in a floating type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.model.checkpoint.quantized.awq import Awq
from trio_llm.model.checkpoint.quantized.compressed_tensors import read_compressed_tensors
from trio_llm.model.checkpoint.quantized.gptq import Gptq
from trio_llm.model.checkpoint.quantized.parts import Format, Parts
from trio_llm.model.checkpoint.quantized.scaled import Scaled, read_block
from trio_llm.model.checkpoint.tensors import FLOATS, QuantizedInfo, TensorInfo
from trio_llm.model.config import ModelConfig

_ORIGINAL = "load the original checkpoint, and --quantization int8 to quantise it here"
_INSTEAD = {"bitsandbytes": f"bitsandbytes quantises when it loads: {_ORIGINAL}"}
_SUPPORTED = "AWQ, GPTQ, compressed-tensors and fp8 are"
# Scales of a quantised KV cache; --kv-quantization measures its own.
_KV_SCALES = ("q_scale", "k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point")


def read_formats(config: ModelConfig) -> list[Format]:
    """Return the formats in which a checkpoint's matrices may be stored.

    Args:
        config: quantization_config.
    Raises:
        UnsupportedError: A format that cannot be read, by name.
    """
    method = config.values.get("quant_method", "unknown")
    match method:
        case "gptq":
            return [Gptq.of(config)]
        case "awq":
            return [Awq.of(config)]
        case "fp8":
            return [Scaled(read_block(config, "weight_block_size"))]
        case "compressed-tensors":
            return read_compressed_tensors(config)
        case _:
            instead = _INSTEAD.get(str(method), _ORIGINAL)
            raise UnsupportedError(
                f"{config.source}: quant_method = {method!r} is not supported; {_SUPPORTED}; {instead}"
            )


def group(
    tensors: Mapping[str, TensorInfo], formats: list[Format], read: Callable[[TensorInfo], Tensor]
) -> dict[str, TensorInfo]:
    """Return the tensors with those that make one quantised matrix as one, named like a plain weight."""
    grouped = {name: info for name, info in tensors.items() if name.rpartition(".")[2] not in _KV_SCALES}
    for name, info in tensors.items():
        module, _, last = name.rpartition(".")
        for kind in formats:
            if last != kind.primary or info.dtype in FLOATS:
                continue
            weight = f"{module}.weight"
            if last != "weight" and weight in grouped:
                raise CheckpointError(f"{info.path}: {module} is stored twice, as {last} and as weight")
            found = {last: grouped.pop(name)}
            for other in kind.others:
                if (part := grouped.pop(f"{module}.{other}", None)) is not None:
                    found[other] = part
            grouped[weight] = _quantized(name, kind, Parts(module, found, read))
    return grouped


def _quantized(name: str, kind: Format, parts: Parts) -> QuantizedInfo:
    scheme = kind.scheme(parts)
    path = parts.infos[kind.primary].path
    nbytes = sum(part.nbytes for part in parts.infos.values())
    return QuantizedInfo(
        path, name, scheme.name, scheme.shape, nbytes,
        template=scheme.template, parts=parts.infos, widen=scheme.widen, keep=scheme.keep,
    )  # fmt: skip
