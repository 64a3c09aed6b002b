"""compressed-tensors: from quantization_config to the formats in which its matrices may be stored."""

from __future__ import annotations

from collections.abc import Iterable

from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.model.checkpoint.quantized.packed import Packed
from trio_llm.model.checkpoint.quantized.parts import Format
from trio_llm.model.checkpoint.quantized.scaled import Scaled, read_block
from trio_llm.model.config import ModelConfig

_PACKED = "pack-quantized"
_SCALED = ("int-quantized", "float-quantized", "naive-quantized")
_BITS = (2, 4, 8)


def read_compressed_tensors(config: ModelConfig) -> list[Format]:
    """Return the formats in which a checkpoint's matrices may be stored. The tensors of a matrix show its format.

    Raises:
        UnsupportedError: A format, sparsity or transform that cannot be read, by name.
    """
    if not isinstance(groups := config.values.get("config_groups"), dict):
        raise CheckpointError(f"{config.source}: config_groups is missing")
    transform = config.values.get("transform_config")
    if transform and (not isinstance(transform, dict) or transform.get("config_groups", True)):
        raise UnsupportedError(f"{config.source}: transform_config: rotated weights are not supported")
    sparsity = config.values.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
        raise UnsupportedError(f"{config.source}: sparsity_config = {sparsity!r} is not supported")
    entries = [config.section("config_groups").section(name) for name in groups]
    weights = {_PACKED: list[ModelConfig](), **{kind: list[ModelConfig]() for kind in _SCALED}}
    for entry in entries:
        if entry.has("weights"):
            kind = entry.get_str("format", config.get_str("format", "unknown"))
            if kind not in weights:
                supported = ", ".join(weights)
                raise UnsupportedError(f"{entry.source}: format = {kind!r} is not supported; {supported} are")
            weights[kind].append(entry.section("weights"))
    scaled = [each for kind in _SCALED for each in weights[kind]]
    blocks = {block for each in scaled if (block := read_block(each, "block_structure"))}
    if len(blocks) > 1:
        raise UnsupportedError(f"{config.source}: blocks of several sizes, {sorted(blocks)}, are not supported")
    formats: list[Format] = [Scaled(next(iter(blocks), None), _are_asymmetric(scaled))]
    if packed := weights[_PACKED]:
        bits = {_bits(each) for each in packed}
        formats.append(Packed(tuple(sorted(bits)), _are_asymmetric(packed)))
    return formats


def _are_asymmetric(weights: Iterable[ModelConfig]) -> bool:
    """Say whether every matrix has a zero point."""
    return bool(symmetric := [each.get_bool("symmetric", True) for each in weights]) and not any(symmetric)


def _bits(weights: ModelConfig) -> int:
    bits = weights.get_int("num_bits")
    if bits not in _BITS or weights.get_str("type", "int").lower() != "int":
        found = f"{weights.get_str('type', 'int')} of {bits} bits"
        raise UnsupportedError(f"{weights.source}: {_PACKED} {found} is not supported; int of 2, 4, 8 bits is")
    return bits
