"""Quantised checkpoints made from tiny ones by packers that share nothing with the reader.

GPTQ, AWQ and fine-grained FP8 are packed here element by element from the formats' definitions; compressed-tensors'
formats are packed, and widened for the comparison, by the compressed-tensors package.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

# A matrix as stored, by last names, and what it is when it is widened, float32.
Packed = tuple[dict[str, Tensor], Tensor]
Packer = Callable[[Tensor], Packed]


def quantize_checkpoint(
    source: Path, directory: Path, packer_of: Callable[[str], Packer | None], quantization: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Write a checkpoint whose matrices of the layers are packed; return all tensors, widened.

    Args:
        packer_of: From a module's name to its packer; None leaves it as it is.
        quantization: quantization_config.
    """
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors", "*.gguf"))
    stored: dict[str, Tensor] = {}
    widened = load_file(source / "model.safetensors")
    for name, tensor in widened.items():
        module = name.removesuffix(".weight")
        packer = packer_of(module) if _is_layer(name, tensor) else None
        if packer is None:
            stored[name] = tensor
            continue
        parts, widened[name] = packer(tensor)
        stored.update({f"{module}.{last}": part.contiguous() for last, part in parts.items()})
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return widened


def _is_layer(name: str, tensor: Tensor) -> bool:
    """Say whether quantisers take a tensor: matrices of the layers, and no router."""
    return tensor.ndim == 2 and ".layers." in name and not name.endswith(".gate.weight")


def _round(weight: Tensor, groups: np.ndarray, bits: int, *, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Return integers [N, K], zero points [N, G] and float16 scales [N, G] for each input's group [K]."""
    values, count, largest = weight.numpy(), int(groups.max()) + 1, 2**bits - 1
    scales = np.zeros((len(values), count), np.float16)
    zeros = np.zeros((len(values), count), np.int64)
    for group in range(count):
        part = values[:, groups == group]
        least, most = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, group] = 2 * np.maximum(-least, most) / largest
            zeros[:, group] = 2 ** (bits - 1)
        else:
            scales[:, group] = (most - least) / largest
            zeros[:, group] = np.clip(np.round(-least / scales[:, group].astype(np.float32)), 0, largest)
    spread = scales.astype(np.float32)[:, groups]
    return np.clip(np.round(values / spread) + zeros[:, groups], 0, largest).astype(np.int64), zeros, scales


def _pack_rows(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack [R, C] along R into int32 words; `order` says which of a word's elements is stored at each place."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    words = np.zeros((len(values) // per_word, values.shape[1]), np.uint32)
    for word in range(len(words)):
        for place, element in enumerate(order):
            words[word] |= values[word * per_word + element].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32).copy())


def gptq(
    bits: int = 4, *, version: int = 1, act_order: bool = False, symmetric: bool = True, group_size: int | None = 16
) -> Packer:
    """Pack as AutoGPTQ does: version 1 stores zero points less one, version 2 as they are."""

    def pack(weight: Tensor) -> Packed:
        inputs = weight.shape[1]
        groups = np.arange(inputs) // (group_size or inputs)
        if act_order:
            groups = np.random.default_rng(inputs).permutation(groups)
        values, zeros, scales = _round(weight, groups, bits, symmetric=symmetric)
        stored_zeros = (zeros - 1) % 2**bits if version == 1 else zeros
        parts = {
            "qweight": _pack_rows(values.T, bits),
            "qzeros": _pack_rows(stored_zeros, bits).T,
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }
        return parts, _widen(values, zeros, scales, groups)

    return pack


def without(packer: Packer, *names: str) -> Packer:
    """Leave parts away."""

    def pack(weight: Tensor) -> Packed:
        parts, widened = packer(weight)
        return {name: part for name, part in parts.items() if name not in names}, widened

    return pack


def adding(packer: Packer, **more: Tensor) -> Packer:
    """Store further tensors beside the parts."""

    def pack(weight: Tensor) -> Packed:
        parts, widened = packer(weight)
        return {**parts, **{name: part.clone() for name, part in more.items()}}, widened

    return pack


def awq(group_size: int = 16) -> Packer:
    """Pack as AutoAWQ's GEMM version does."""
    return lambda weight: _awq(weight, np.arange(weight.shape[1]) // group_size)


def _awq(weight: Tensor, groups: np.ndarray) -> Packed:
    values, zeros, scales = _round(weight, groups, 4, symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        "qweight": _pack_rows(values, 4, order).T,
        "qzeros": _pack_rows(zeros, 4, order).T,
        "scales": torch.from_numpy(scales.T.copy()),
    }
    return parts, _widen(values, zeros, scales, groups)


def _widen(values: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> Tensor:
    widened = (values - zeros[:, groups]).astype(np.float32) * scales.astype(np.float32)[:, groups]
    return torch.from_numpy(widened)


def fp8_blocks(rows: int, columns: int, scale_dtype: torch.dtype = torch.float32) -> Packer:
    """Pack as fine-grained FP8 checkpoints are: one scale per block; blocks at the edges are smaller."""

    def pack(weight: Tensor) -> Packed:
        outputs, inputs = weight.shape
        stored = torch.zeros(outputs, inputs, dtype=torch.float8_e4m3fn)
        scales = torch.zeros(-(-outputs // rows), -(-inputs // columns))
        widened = torch.zeros(outputs, inputs)
        for i, j in np.ndindex(*scales.shape):
            at = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale = (weight[at].abs().max() / 448).log2().ceil().exp2() if scale_dtype != torch.float32 else None
            scales[i, j] = weight[at].abs().max() / 448 if scale is None else scale
            stored[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
            widened[at] = stored[at].float() * scales[i, j]
        return {"weight": stored, "weight_scale_inv": scales.to(scale_dtype)}, widened

    return pack


@attrs.frozen
class Compressed:
    """A format of compressed-tensors: packs and widens by the package, and writes the entry of config_groups."""

    format: str
    weights: dict[str, Any]
    activations: dict[str, Any] | None = None

    @property
    def entry(self) -> dict[str, Any]:
        return {"targets": ["Linear"], "format": self.format, "weights": self.weights, "input_activations": None}

    def __call__(self, weight: Tensor) -> Packed:
        args = QuantizationArgs(**self.weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(self.format)
        scale, zero = scales_of(weight, args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        parts = compressor.compress(state, scheme)
        return parts, compressor.decompress(parts, scheme)["weight"].contiguous()


def scales_of(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Return scales and zero points for a strategy, from each part's least and largest weight."""
    from compressed_tensors.quantization.utils import calculate_qparams

    outputs, inputs = weight.shape
    match str(args.strategy):
        case "tensor":
            shape, parts = (1,), weight.reshape(1, -1)
        case "channel":
            shape, parts = (outputs, 1), weight
        case "group":
            assert args.group_size is not None
            shape, parts = (outputs, inputs // args.group_size), weight.reshape(-1, args.group_size)
        case "block":
            assert args.block_structure is not None
            rows, columns = args.block_structure
            shape = (-(-outputs // rows), -(-inputs // columns))
            padded = torch.zeros(shape[0] * rows, shape[1] * columns)
            padded[:outputs, :inputs] = weight
            parts = padded.view(shape[0], rows, shape[1], columns).transpose(1, 2).reshape(-1, rows * columns)
        case other:
            raise AssertionError(other)
    scale, zero = calculate_qparams(parts.amin(1), parts.amax(1), args)
    return scale.reshape(shape), zero.reshape(shape)


def pack_with_order(weight: Tensor) -> Packed:
    """Pack in groups of 16 by importance: weight_g_idx, as older versions of the compressed-tensors package wrote."""
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=16)
    order = torch.from_numpy(np.random.default_rng(weight.shape[1]).permutation(weight.shape[1]))
    parts, widened = Compressed("pack-quantized", args.model_dump())(weight[:, order])
    back = torch.argsort(order)
    values = torch.round(widened / parts["weight_scale"].repeat_interleave(16, 1)).to(torch.int8)[:, back]
    groups = (torch.arange(weight.shape[1]) // 16)[back].to(torch.int32)
    return {**parts, "weight_packed": pack_to_int32(values, 4), "weight_g_idx": groups}, widened[:, back]
