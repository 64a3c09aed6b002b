"""The table of formats in docs/models.md, from what the readers make of a matrix: `python -m tests.model.formats`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file

from tests.model.quantized_files import Compressed, Packer, awq, fp8_blocks, gptq
from trio_llm.model.checkpoint.gguf import FORMATS
from trio_llm.model.checkpoint.gguf_blocks import CONVERTERS
from trio_llm.model.checkpoint.safetensors import open_checkpoint
from trio_llm.model.config import ModelConfig
from trio_llm.model.ops import cuda
from trio_llm.model.ops.matrices import Blocks

SIDE = 256
HEADER = ("format", "bits a weight in the file", "on a CPU", "bits in memory", "on a GPU", "error", "proof")
WIDENED, AS_ON_CPU, NO_ERROR, ROUNDED = "`--dtype`", "the same", "none in float32", "activations of 8 bits"
ON_FP8 = "FP8, or `--dtype`"
GGUF_PROOF = "test_every_format_is_widened_as_the_library_does"
KEPT_PROOF = "test_stored_numbers_compute_what_widened_weights_do"
WIDENED_PROOF = "test_a_format_is_widened_as_its_own_package_does"
_GROUPS = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
_CHANNELS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


def _compressed(name: str, kind: str, weights: dict[str, Any]) -> tuple[str, Packer, dict[str, Any]]:
    packer = Compressed(kind, weights)
    entry = {"config_groups": {"group_0": packer.entry}, "ignore": []}
    return name, packer, {"quant_method": "compressed-tensors", "format": kind, **entry}


# What varies within a format, how it is packed, and what config.json says. Groups have 128 inputs where there are any.
SAFETENSORS: tuple[tuple[str, Packer, dict[str, Any]], ...] = (
    ("", awq(128), _AWQ),
    ("groups of 8", awq(8), {**_AWQ, "group_size": 8}),
    ("", gptq(2, group_size=128), {**_GPTQ, "bits": 2}),
    ("", gptq(group_size=128), _GPTQ),
    ("activation order", gptq(act_order=True, group_size=128), {**_GPTQ, "desc_act": True}),
    ("", gptq(8, group_size=128), {**_GPTQ, "bits": 8}),
    _compressed("", "pack-quantized", {**_GROUPS, "num_bits": 2}),
    _compressed("", "pack-quantized", {**_GROUPS, "num_bits": 4}),
    _compressed("zero points", "pack-quantized", {**_GROUPS, "num_bits": 4, "symmetric": False}),
    _compressed("", "pack-quantized", {**_GROUPS, "num_bits": 8}),
    _compressed("a scale for each output", "int-quantized", _CHANNELS),
    _compressed("groups", "int-quantized", {**_GROUPS, "num_bits": 8}),
    _compressed("a scale for each output", "float-quantized", _FP8),
    ("blocks of 128 x 128", fp8_blocks(128, 128), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
)


def rows() -> list[tuple[str, ...]]:
    """Return the table's rows: all formats of GGUF files, then those of safetensors."""
    return [*_gguf_rows(), *_safetensors_rows()]


def _gguf_rows() -> Iterator[tuple[str, ...]]:
    for name in FORMATS:
        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        stored = None
        if name in CONVERTERS:
            raw = torch.empty((SIDE, SIDE // block, nbytes), dtype=torch.uint8, device="meta")
            stored = CONVERTERS[name](raw)
        yield _row(f"GGUF {name}", 8 * nbytes / block, stored, GGUF_PROOF)


def _safetensors_rows() -> Iterator[tuple[str, ...]]:
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    for variant, packer, config in SAFETENSORS:
        parts, _ = packer(weight)
        with tempfile.TemporaryDirectory() as directory:
            tensors = {f"a.{name}": part.contiguous() for name, part in parts.items()}
            save_file(tensors, Path(directory) / "model.safetensors")
            quantization = ModelConfig(config, "config.json")
            info = open_checkpoint(Path(directory), multimodal=False, quantization=quantization).tensors["a.weight"]
        stored = None if info.template is None else info.template()
        name = f"{info.dtype}, {variant}" if variant else info.dtype
        is_widened = stored is None or stored.is_fp8
        yield _row(name, 8 * info.nbytes / SIDE**2, stored, WIDENED_PROOF if is_widened else KEPT_PROOF)
    experts = "experts with activation order", "", WIDENED, "", WIDENED, NO_ERROR
    yield *experts, "test_experts_with_an_order_are_widened"


def _row(name: str, bits: float, stored: Blocks | None, proof: str) -> tuple[str, ...]:
    if stored is not None and stored.is_fp8:
        return name, f"{bits:.4g}", WIDENED, "", ON_FP8, NO_ERROR, proof
    if stored is None:
        return name, f"{bits:.4g}", WIDENED, "", WIDENED, NO_ERROR, proof
    on_gpu = AS_ON_CPU if cuda.keeps(stored, torch.bfloat16, False) else WIDENED
    return name, f"{bits:.4g}", _described(stored), f"{8 * stored.nbytes / SIDE**2:.4g}", on_gpu, ROUNDED, proof


def _described(stored: Blocks) -> str:
    """Say what blocks consist of."""
    extras = {
        "zero points": stored.zero is not None,
        "minima": stored.minimum is not None,
        "integer scales": stored.outer is not None,
        "an order": stored.order is not None,
    }
    bits = 4 if stored.weight.dtype == torch.uint8 else 8
    group = stored.inputs // stored.scale.shape[-1]
    with_extras = "".join(f", {name}" for name, there in extras.items() if there)
    return f"{bits} bits, groups of {'all' if group == SIDE else group}{with_extras}"


def table() -> str:
    """Return the table in Markdown."""
    lines = [HEADER, ("---",) * len(HEADER), *((*row[:-1], f"`{row[-1]}`") for row in rows())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
