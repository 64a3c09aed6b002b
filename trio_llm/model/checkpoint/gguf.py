"""GGUF files as checkpoints: tensors under Hugging Face's names and in its order, as stored or dequantised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.gguf.config import config_json, generation_json, set_rope_factors
from trio_llm.gguf.header import GgufHeader, GgufTensor, read_gguf
from trio_llm.gguf.names import hf_names
from trio_llm.model.checkpoint.gguf_blocks import CONVERTERS
from trio_llm.model.checkpoint.tensors import Checkpoint, MappedFiles, TensorInfo
from trio_llm.model.config import ModelConfig
from trio_llm.model.ops.seam import Blocks

FORMATS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "MXFP4",
)  # fmt: skip
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_ELEMENTS = 2**21  # converted at a time: intermediate arrays are several times as large
# Bytes that each weight of a chunk takes meanwhile, measured.
_KEPT_SCRATCH, _WIDENED_SCRATCH = 25, 14
_ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(path: Path) -> tuple[ModelConfig, ModelConfig, Checkpoint]:
    """Read the header of a GGUF file, and of its other shards.

    Returns:
        The equivalents of config.json and generation_config.json, and the checkpoint.
    Raises:
        CheckpointError: The file is damaged.
        UnsupportedError: The architecture or the format of a tensor is not supported.
    """
    library = _library(path)
    header = read_gguf(path)
    values = config_json(header)
    infos = {name: _info(tensor, library) for name, tensor in header.tensors.items()}
    reader = _Reader(header, library, _rotated_heads(header, values))
    if (factors := infos.pop(_ROPE_FACTORS, None)) is not None:
        set_rope_factors(values, reader.read(factors).tolist())
    tensors: dict[str, TensorInfo] = {}
    for info in infos.values():
        tensors.update(_under_its_names(info, values["architectures"][0]))
    checkpoint = Checkpoint(path, tensors, {}, lambda: reader, reader.scratch_bytes)
    return ModelConfig(values, str(path)), ModelConfig(generation_json(header), str(path)), checkpoint


def _library(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{path}: to read GGUF files, pip install 'trio-llm[gguf]'") from None
    return gguf


def _info(tensor: GgufTensor, library: Any) -> TensorInfo:
    try:
        kind = library.GGMLQuantizationType(tensor.kind)
    except ValueError:
        raise UnsupportedError(f"{tensor.path}: tensor {tensor.name} is of the unknown type {tensor.kind}") from None
    if kind.name not in FORMATS:
        supported = ", ".join(FORMATS)
        raise UnsupportedError(
            f"{tensor.path}: tensor {tensor.name} is stored as {kind.name}; {supported} are supported"
        )
    block, block_bytes = library.GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name}: rows of {tensor.shape[-1]} in blocks of {block}")
    nbytes = torch.Size(tensor.shape).numel() // block * block_bytes
    if tensor.offset + nbytes > tensor.path.stat().st_size:
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name} ends beyond the end of the file")
    return TensorInfo(
        tensor.path,
        tensor.name,
        kind.name,
        tensor.shape,
        nbytes,
        template=_template(kind.name, tensor.shape, block, block_bytes),
    )


def _template(kind: str, shape: tuple[int, ...], block: int, block_bytes: int) -> Callable[[], Blocks] | None:
    """Return what makes the matrix, or one of stacked ones, without its values; None if kernels cannot use it."""
    if kind not in CONVERTERS or len(shape) < 2:
        return None
    raw = (shape[-2], shape[-1] // block, block_bytes)
    return lambda: CONVERTERS[kind](torch.empty(raw, dtype=torch.uint8, device="meta"))


def _under_its_names(info: TensorInfo, architecture: str) -> dict[str, TensorInfo]:
    """Return a tensor by its Hugging Face name, or a stacked one as its experts by theirs; unknown names stay."""
    names = hf_names(info.stored_name, architecture, info.shape[0])
    if len(names) == 1:
        return {names[0]: info}
    one = attrs.evolve(info, shape=info.shape[1:], nbytes=info.nbytes // len(names))
    return {name: attrs.evolve(one, index=index) for index, name in enumerate(names)}


def _rotated_heads(header: GgufHeader, values: Mapping[str, Any]) -> dict[str, int]:
    """Return the head counts of q and k if llama.cpp reorders their rows, as for Llama: it rotates neighbours."""
    if header.metadata["general.architecture"] not in ("llama", "mistral3"):
        return {}
    heads = values["num_attention_heads"]
    return {"attn_q": heads, "attn_k": values.get("num_key_value_heads", heads)}


class _Reader:
    """Reads tensors of memory-mapped files: as stored, or quantised ones in float32."""

    def __init__(self, header: GgufHeader, library: Any, rotated_heads: Mapping[str, int]) -> None:
        self._tensors, self._library, self._rotated_heads = header.tensors, library, rotated_heads
        # Copy on write: torch takes no array that it must not write to.
        self._files = MappedFiles(lambda path: np.memmap(path, np.uint8, mode="c"))

    def read(self, info: TensorInfo) -> Tensor:
        data, heads = self._data(info), self._heads(info)
        if info.dtype in _FLOATS:
            found = torch.from_numpy(data).view(_FLOATS[info.dtype]).view(info.shape)
        else:
            found = self._widen(data, info)
        return found if heads is None else _halves(found, heads)

    def scratch_bytes(self, info: TensorInfo, as_stored: bool) -> int:
        """Return the most memory that reading takes: float32 of all weights unless as stored, and a chunk's arrays."""
        if info.dtype in _FLOATS:  # the file is mapped
            return 0 if self._heads(info) is None else info.nbytes
        count = math.prod(info.shape)
        chunk = min(count, max(_CHUNK_ELEMENTS, info.shape[-1]))
        return _KEPT_SCRATCH * chunk if as_stored else 4 * count + _WIDENED_SCRATCH * chunk

    def read_stored(self, info: TensorInfo) -> Blocks:
        outputs, inputs = info.shape
        block, block_bytes = self._library.GGML_QUANT_SIZES[self._library.GGMLQuantizationType[info.dtype]]
        raw = torch.from_numpy(self._data(info)).view(outputs, inputs // block, block_bytes)
        heads = self._heads(info)
        rows = raw if heads is None else _halves(raw, heads)
        chunks = rows.split(max(1, _CHUNK_ELEMENTS // inputs))
        return Blocks.gathered(outputs, map(CONVERTERS[info.dtype], chunks))

    def close(self) -> None:
        self._files.close()

    def _data(self, info: TensorInfo) -> NDArray[np.uint8]:
        begin = self._tensors[info.stored_name].offset + info.index * info.nbytes
        return self._files.at(info.path, info.nbytes)[begin : begin + info.nbytes]

    def _heads(self, info: TensorInfo) -> int | None:
        """Return the number of heads of a matrix whose rows llama.cpp reorders, None for others."""
        return self._rotated_heads.get(info.stored_name.split(".")[-2])

    def _widen(self, data: NDArray[np.uint8], info: TensorInfo) -> Tensor:
        kind = self._library.GGMLQuantizationType[info.dtype]
        rows = data.reshape(-1, info.nbytes // (torch.Size(info.shape[:-1]).numel()))
        out = torch.empty(len(rows), info.shape[-1])
        step = max(1, _CHUNK_ELEMENTS // info.shape[-1])
        for first in range(0, len(rows), step):
            with np.errstate(all="ignore"):  # Damaged scales give infinities, which the check of the weights reports.
                chunk = self._library.dequantize(rows[first : first + step], kind)
            out[first : first + step] = torch.from_numpy(np.array(chunk, np.float32))
        return out.view(info.shape)


def _halves(rows: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's interleaving: put the two halves of each head's rows one after the other."""
    pairs = rows.view(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
