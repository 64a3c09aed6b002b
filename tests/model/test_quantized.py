"""Quantised safetensors checkpoints: every format against an independent dequantiser, and through whole models."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.golden import FP32_TOLERANCE, Golden, max_difference
from tests.model.paged import CPU, load
from tests.model.quantized_files import (
    Compressed,
    Packer,
    adding,
    awq,
    fp8_blocks,
    gptq,
    pack_with_order,
    quantize_checkpoint,
    without,
)
from tests.test_docs import rows
from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.model.checkpoint.safetensors import open_checkpoint
from trio_llm.model.config import ModelConfig
from trio_llm.model.load import load_runner
from trio_llm.model.loading.loader import inspect_model, load_model

Q_PROJ = "model.layers.1.self_attn.q_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
F8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
STATIC = {"input_scale": torch.tensor([0.5]), "output_scale": torch.tensor([0.25])}


@attrs.frozen
class Case:
    """A format: who packs, what quantization_config says, and what the reader calls it."""

    packer: Packer
    config: dict[str, Any]
    name: str
    family: str = "llama"


def compressed(name: str, kind: str, weights: dict[str, Any], family: str = "llama", **more: Tensor) -> Case:
    """Return a case of compressed-tensors with one group; `more` tensors stand beside each matrix."""
    packer = Compressed(kind, weights)
    return Case(adding(packer, **more), compressed_config(packer), name, family)


def compressed_config(*packers: Compressed, **more: Any) -> dict[str, Any]:
    """Return the quantization_config of some formats."""
    groups = {f"group_{index}": packer.entry for index, packer in enumerate(packers)}
    kind = packers[0].format if len(packers) == 1 else "mixed-precision"
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": groups,
        "ignore": ["lm_head"],
        **more,
    }


CASES = {
    "gptq": Case(gptq(), GPTQ, "GPTQ 4-bit"),
    "gptq-v1-asymmetric": Case(gptq(symmetric=False), {**GPTQ, "sym": False}, "GPTQ 4-bit"),
    "gptq-v2-act-order": Case(
        gptq(version=2, act_order=True, symmetric=False),
        {**GPTQ, "desc_act": True, "checkpoint_format": "gptq_v2"},
        "GPTQ 4-bit",
    ),
    "gptq-8-act-order-biases": Case(gptq(8, act_order=True), {**GPTQ, "bits": 8}, "GPTQ 8-bit", "qwen2"),
    "gptq-2": Case(gptq(2, symmetric=False), {**GPTQ, "bits": 2}, "GPTQ 2-bit"),
    "gptq-no-g-idx": Case(without(gptq(), "g_idx"), GPTQ, "GPTQ 4-bit"),
    "gptq-one-group": Case(without(gptq(group_size=None), "g_idx"), {**GPTQ, "group_size": -1}, "GPTQ 4-bit"),
    "gptq-experts": Case(gptq(), GPTQ, "GPTQ 4-bit", "mixtral"),
    "awq": Case(awq(), AWQ, "AWQ 4-bit"),
    "awq-experts": Case(awq(8), {**AWQ, "group_size": 8}, "AWQ 4-bit", "qwen3-moe"),
    "w4a16": compressed("compressed-tensors 4-bit", "pack-quantized", W4),
    "w4a16-asymmetric": compressed("compressed-tensors 4-bit", "pack-quantized", {**W4, "symmetric": False}),
    "w4a16-channel-asymmetric": compressed(
        "compressed-tensors 4-bit", "pack-quantized", {**W8, "num_bits": 4, "symmetric": False}, "qwen2"
    ),
    "w4a16-tensor": compressed(
        "compressed-tensors 4-bit", "pack-quantized", {**W4, "strategy": "tensor", "group_size": None}
    ),
    "w8a16-packed": compressed("compressed-tensors 8-bit", "pack-quantized", W8),
    "w4a16-act-order": Case(
        pack_with_order,
        compressed_config(Compressed("pack-quantized", {**W4, "actorder": "group"})),
        "compressed-tensors 4-bit",
    ),
    "w4a16-experts": compressed("compressed-tensors 4-bit", "pack-quantized", W4, "mixtral"),
    "w8a8": compressed("INT8", "int-quantized", W8, "llama", **STATIC),
    "w8a8-asymmetric": compressed("INT8", "int-quantized", {**W8, "symmetric": False}),
    "w8a16-groups": compressed("INT8", "int-quantized", {**W8, "strategy": "group", "group_size": 16}),
    "fp8-tensor": compressed("FP8", "float-quantized", F8, "llama", **STATIC),
    "fp8-channel": compressed("FP8", "float-quantized", {**F8, "strategy": "channel"}),
    "fp8-block": compressed(
        "FP8", "float-quantized", {**F8, "strategy": "block", "block_structure": [32, 32]}, "qwen3-moe"
    ),
    "fp8-gemma4": compressed("FP8", "float-quantized", {**F8, "strategy": "channel"}, "gemma4-e2b"),
    "fp8-naive": compressed("FP8", "naive-quantized", F8),
    "fp8-fine-grained": Case(fp8_blocks(32, 32), FP8, "FP8"),
    "fp8-fine-grained-experts": Case(fp8_blocks(32, 32), FP8, "FP8", "qwen3-moe"),
    "fp8-powers-of-two": Case(fp8_blocks(32, 32, torch.float8_e8m0fnu), {**FP8, "scale_fmt": "ue8m0"}, "FP8"),
    "fp8-per-tensor": Case(
        adding(Compressed("float-quantized", F8), **STATIC),
        {"quant_method": "fp8", "activation_scheme": "static"},
        "FP8",
    ),
}


def twin_of(directory: Path, widened: dict[str, Tensor], made: Golden) -> Golden:
    """Return transformers' logits for a plain checkpoint of the widened weights."""
    shutil.copytree(made.directory, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(widened, directory / "model.safetensors", {"format": "pt"})
    oracle = type(made.oracle).from_pretrained(directory, dtype=torch.float32).eval()
    prompts = made.prompts[:2]
    with torch.inference_mode():
        logits = [oracle(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]
    return Golden(directory, oracle, prompts, logits, [])


@pytest.mark.parametrize("case", CASES)
def test_a_format_is_widened_as_its_own_package_does(
    case: str, golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    """Each weight is the independent dequantiser's, bit for bit, and the model's logits are transformers'."""
    packer, config, name, family = attrs.astuple(CASES[case], recurse=False)
    made = golden(family)
    widened = quantize_checkpoint(made.directory, tmp_path / "model", lambda _: packer, config)
    plan = inspect_model(EngineConfig(model=str(tmp_path / "model"), block_size=4, dtype="float32"))
    assert plan.checkpoint is not None
    assert set(plan.stored_formats) == {name, "F32"}
    stored = load_file(tmp_path / "model/model.safetensors")
    assert plan.stored_bytes == sum(tensor.nbytes for tensor in stored.values())
    reader = plan.checkpoint.open()
    for tensor, info in plan.checkpoint.tensors.items():
        torch.testing.assert_close(reader.read(info), widened[tensor], rtol=0, atol=0)
    assert max_difference(load_model(plan, CPU), twin_of(tmp_path / "twin", widened, made), 7) < FP32_TOLERANCE


def test_layers_may_differ(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """One checkpoint holds 4-bit, packed 8-bit, FP8 and plain layers; scales of a KV cache are passed over."""
    made = golden("llama")
    w4, w8, f8 = (
        Compressed("pack-quantized", W4), Compressed("pack-quantized", W8), Compressed("float-quantized", F8),
    )  # fmt: skip
    layers = {"0": w4, "1": w8, "2": f8}

    def packer_of(module: str) -> Packer | None:
        return None if module.endswith("o_proj") else layers[module.split(".")[2]]

    config = compressed_config(w4, w8, f8, kv_cache_scheme={"num_bits": 8, "type": "float"})
    widened = quantize_checkpoint(made.directory, tmp_path / "model", packer_of, config)
    edit(
        tmp_path / "model",
        lambda tensors: tensors.update({f"model.layers.0.self_attn.{each}_scale": torch.ones(1) for each in "kv"}),
    )
    loaded = load(tmp_path / "model", dtype="float32")
    assert set(loaded.plan.stored_formats) == {"compressed-tensors 4-bit", "compressed-tensors 8-bit", "FP8", "F32"}
    assert max_difference(loaded, twin_of(tmp_path / "twin", widened, made), None) < FP32_TOLERANCE


def test_the_language_model_of_a_wrapper_is_read(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """Quantised matrices of a multimodal checkpoint are found under its names; other towers' are left out."""
    made = golden("gemma4-wrapper")
    packer = Compressed("pack-quantized", {**W8, "num_bits": 4})
    widened = quantize_checkpoint(made.directory, tmp_path / "model", lambda _: packer, compressed_config(packer))
    loaded = load(tmp_path / "model", dtype="float32")
    assert loaded.plan.skipped
    assert max_difference(loaded, twin_of(tmp_path / "twin", widened, made), None) < FP32_TOLERANCE


def test_gptq_layers_may_have_bits_of_their_own(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """GPTQModel's "dynamic" quantises some layers to other bits, or not at all; their shapes say so."""
    made = golden("llama")
    packers = {"0": gptq(8, group_size=8), "1": gptq(), "2": None}
    widened = quantize_checkpoint(
        made.directory,
        tmp_path / "model",
        lambda module: packers[module.split(".")[2]],
        {**GPTQ, "dynamic": {"-:.*2": {}}},
    )
    loaded = load(tmp_path / "model", dtype="float32")
    assert set(loaded.plan.stored_formats) == {"GPTQ 8-bit", "GPTQ 4-bit", "F32"}
    assert max_difference(loaded, twin_of(tmp_path / "twin", widened, made), None) < FP32_TOLERANCE


@pytest.mark.parametrize("shape", [(300, 200), (128, 128), (1, 200), (129, 64)])
def test_blocks_of_128_may_be_cut_at_the_edges(shape: tuple[int, int], tmp_path: Path) -> None:
    """The blocks of published FP8 checkpoints, on matrices that they do not divide."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    parts, widened = fp8_blocks(128, 128)(weight)
    read = read_matrix(parts, {**FP8, "weight_block_size": [128, 128]}, tmp_path)
    torch.testing.assert_close(read, widened, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("pack-quantized", {**W4, "symmetric": False}),
        ("int-quantized", {**W8, "symmetric": False}),
        ("float-quantized", {**F8, "strategy": "channel"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits_give_the_same_weights_of_16_bits(
    kind: str, weights: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """compressed-tensors computes in the scales' type: widening in float32 and rounding once gives the same."""
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(2)).to(dtype)
    packer = Compressed(kind, weights)
    parts, widened = packer(weight)
    assert widened.dtype == parts["weight_scale"].dtype == dtype
    read = read_matrix(parts, compressed_config(packer), tmp_path)
    torch.testing.assert_close(read.to(dtype), widened, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(48, 100), (33, 52)])
def test_rows_may_end_inside_a_word(shape: tuple[int, int], tmp_path: Path) -> None:
    """compressed-tensors pads rows, and columns of zero points, to whole words; weight_shape has the true size."""
    packer = Compressed("pack-quantized", {**W8, "num_bits": 4, "symmetric": False})
    parts, widened = packer(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    read = read_matrix(parts, compressed_config(packer), tmp_path)
    torch.testing.assert_close(read, widened, rtol=0, atol=0)


def test_older_files_of_compressed_tensors_are_read(tmp_path: Path) -> None:
    """Zero points that are not packed, a g_idx of -1 without activation order, and blocks written as text."""
    packer = Compressed("pack-quantized", {**W4, "symmetric": False})
    parts, widened = packer(torch.randn(48, 64, generator=torch.Generator().manual_seed(5)))
    zeros = unpack_from_int32(parts["weight_zero_point"], 4, torch.Size((48, 4)), packed_dim=0)
    older = {**parts, "weight_zero_point": zeros, "weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    torch.testing.assert_close(read_matrix(older, compressed_config(packer), tmp_path), widened, rtol=0, atol=0)
    packer = Compressed("float-quantized", {**F8, "strategy": "block", "block_structure": "32x16"})
    parts, widened = packer(torch.randn(50, 40, generator=torch.Generator().manual_seed(6)))
    torch.testing.assert_close(read_matrix(parts, compressed_config(packer), tmp_path), widened, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_a_zero_point_of_zero_is_zero_in_both_versions_of_gptq(version: int, bits: int, tmp_path: Path) -> None:
    """Version 1 stores zero points less one, in their bits: that of weights without a negative one wraps around."""
    weight = torch.rand(32, 64, generator=torch.Generator().manual_seed(4))
    parts, widened = gptq(bits, version=version, symmetric=False)(weight)
    assert (parts["qzeros"] == (-1 if version == 1 else 0)).all()
    read = read_matrix(
        parts, {**GPTQ, "bits": bits, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}, tmp_path
    )
    torch.testing.assert_close(read, widened, rtol=0, atol=0)


def read_matrix(parts: dict[str, Tensor], quantization: dict[str, Any], directory: Path) -> Tensor:
    """Write the parts of one matrix to a checkpoint and read that."""
    save_file({f"a.{name}": part.contiguous() for name, part in parts.items()}, directory / "model.safetensors")
    checkpoint = open_checkpoint(directory, multimodal=False, quantization=ModelConfig(quantization, "config.json"))
    assert list(checkpoint.tensors) == ["a.weight"]
    return checkpoint.open().read(checkpoint.tensors["a.weight"])


@pytest.mark.parametrize("case", ["gptq-v2-act-order", "awq", "w4a16", "fp8-fine-grained"])
def test_int8_on_top_is_int8_of_the_widened_weights(case: str, golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """--quantization int8 makes of a quantised checkpoint what it makes of its widened twin."""
    made = golden("llama")
    packer, config, *_ = attrs.astuple(CASES[case], recurse=False)
    widened = quantize_checkpoint(made.directory, tmp_path / "model", lambda _: packer, config)
    twin_of(tmp_path / "twin", widened, made)
    ours, twin = (load(tmp_path / name, dtype="float32", quantization="int8") for name in ("model", "twin"))
    assert ours.plan.weight_bytes == twin.plan.weight_bytes
    for first, second in zip(ours.model.layers, twin.model.layers, strict=True):  # type: ignore[attr-defined]
        for pick in (lambda layer: layer.attention.qkv, lambda layer: layer.mlp.down):
            torch.testing.assert_close(pick(first).weight, pick(second).weight, rtol=0, atol=0)
            torch.testing.assert_close(pick(first).scale, pick(second).scale, rtol=0, atol=0)


def test_log_table_and_description_have_what_is_not_computed_as_stored(
    golden: Callable[[str], Golden], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Loading names each format with its bytes, what it is computed in, and the bytes in memory."""
    quantize_checkpoint(golden("llama").directory, tmp_path / "model", lambda _: gptq(), GPTQ)
    with caplog.at_level(logging.WARNING):
        info = load_runner(EngineConfig(model=str(tmp_path / "model"), dtype="float32", device="cpu")).info
    assert re.search(
        r"model: computed in float32, not as stored, for lack of a kernel: GPTQ 4-bit \(\d+ MB\); "
        r"all weights take \d+ MB in memory",
        caplog.text,
    )
    tensors = load_file(tmp_path / "model/model.safetensors")
    quantised = sum(t.nbytes for name, t in tensors.items() if name.endswith(("qweight", "qzeros", "scales", "g_idx")))
    plain = sum(t.nbytes for t in tensors.values()) - quantised
    assert info.stored_formats == {"GPTQ 4-bit": quantised, "F32": plain}
    assert f"float32; the files have {plain:,} bytes of F32, {quantised:,} bytes of GPTQ 4-bit\n" in info.memory_table


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite model.safetensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture(scope="module")
def damaged(golden: Callable[[str], Golden], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a case to a fresh copy of its checkpoint, to be damaged."""
    made: dict[str, Path] = {}

    def copy(case: str) -> Path:
        packer, config, _, family = attrs.astuple(CASES[case], recurse=False)
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case) / "model"
            quantize_checkpoint(golden(family).directory, made[case], lambda _: packer, config)
        return Path(shutil.copytree(made[case], tmp_path_factory.mktemp("copy") / "model"))

    return copy


def refusal(directory: Path) -> str:
    """Return why a checkpoint is refused."""
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        load_model(inspect_model(EngineConfig(model=str(directory), dtype="float32")), CPU)
    return str(caught.value)


def resized(*shape: int) -> Callable[[Tensor], Tensor]:
    """Return a change of a tensor to another shape."""
    return lambda tensor: torch.zeros(shape, dtype=tensor.dtype)


HOSTILE: dict[str, tuple[str, str, Callable[[Tensor], Tensor] | None, str]] = {
    "g_idx past the end": (
        "gptq",
        "g_idx",
        lambda t: t + 1,
        "q_proj.qweight (GPTQ 4-bit): groups of inputs are from 1 to 3",
    ),
    "g_idx negative": ("gptq", "g_idx", lambda t: t - 1, "groups of inputs are from -1 to 1; there are 3"),
    "g_idx short": ("gptq", "g_idx", lambda t: t[1:], "q_proj.g_idx has the shape [47]; expected [48]"),
    "g_idx not whole": ("gptq", "g_idx", lambda t: t.float(), "q_proj.g_idx is stored as F32; expected I32 or I64"),
    "no scales": ("gptq", "scales", None, "q_proj.scales is missing"),
    "no zeros": ("gptq", "qzeros", None, "q_proj.qzeros is missing"),
    "no weight": ("gptq", "qweight", None, "missing model.layers.1.self_attn.q_proj.weight [64, 48]"),
    "narrow scales": ("gptq", "scales", resized(3, 63), "q_proj.scales has the shape [3, 63]; expected [3, 64]"),
    "few groups": ("gptq-no-g-idx", "scales", resized(2, 64), "q_proj.qzeros has the shape [3, 8]; expected [2, 8]"),
    "odd zeros": ("gptq", "qzeros", resized(3, 5), "q_proj.qzeros has 5 words for 64 zero points"),
    "wide words": ("gptq", "qweight", lambda t: t.long(), "q_proj.qweight is stored as I64; expected I32"),
    "infinite scale": ("gptq", "scales", lambda t: t / 0, "q_proj.weight: holds NaN or infinity"),
    "no rows": ("awq", "qweight", resized(0, 8), "q_proj.qweight has the shape [0, 8]; expected a matrix"),
    "a cube": ("awq", "qweight", resized(2, 2, 2), "q_proj.qweight has the shape [2, 2, 2]; expected a matrix"),
    "awq zeros": ("awq", "qzeros", resized(3, 7), "q_proj.qzeros has the shape [3, 7]; expected [3, 8]"),
    "awq of other inputs": ("awq", "qweight", resized(96, 8), "misshapen model.layers.1.self_attn.q_proj.weight"),
    "awq groups": ("awq", "qweight", resized(50, 8), "q_proj.scales has 3 groups, which do not divide 50 inputs"),
    "packed scale": ("w4a16", "weight_scale", None, "q_proj.weight_scale is missing"),
    "packed scale width": (
        "w4a16",
        "weight_scale",
        resized(64, 5),
        "weight_scale has 5 groups, which do not divide 48",
    ),
    "packed shape": (
        "w4a16",
        "weight_shape",
        lambda t: t + torch.tensor([0, 16]),
        "q_proj.weight_shape is [64, 64]; 64 x 6 words",
    ),
    "packed shape negative": ("w4a16", "weight_shape", lambda t: -t, "q_proj.weight_shape is [-64, -48]"),
    "no packed shape": ("w4a16", "weight_shape", None, "q_proj.weight_shape is missing"),
    "no zero points": ("w4a16-asymmetric", "weight_zero_point", None, "q_proj.weight_zero_point is missing"),
    "few zero points": ("w4a16-asymmetric", "weight_zero_point", resized(7, 3), "expected [8, 3]"),
    "packed order": (
        "w4a16-act-order",
        "weight_g_idx",
        lambda t: t + 9,
        "groups of inputs are from 9 to 11; there are 3",
    ),
    "int8 scale": ("w8a8", "weight_scale", None, "q_proj.weight_scale is missing"),
    "int8 scale shape": ("w8a8", "weight_scale", resized(63, 1), "has the shape [63, 1] for 64 x 48 weights"),
    "int8 zero point": ("w8a8-asymmetric", "weight_zero_point", None, "q_proj.weight_zero_point is missing"),
    "fp8 scale": ("fp8-fine-grained", "weight_scale_inv", None, "q_proj.weight_scale is missing"),
    "fp8 blocks": ("fp8-fine-grained", "weight_scale_inv", resized(3, 2), "or block of 32 x 32"),
    "fp8 NaN": (
        "fp8-fine-grained",
        "weight",
        lambda t: (t.float() * torch.nan).to(t.dtype),
        "q_proj.weight: holds NaN",
    ),
    "fp8 in words": ("fp8-fine-grained", "weight", lambda t: t.int(), "q_proj.weight is stored as I32; expected I8 or"),
}


def test_every_hostile_checkpoint_is_documented() -> None:
    """The table of docs/security.md has each of them, and what its error says."""
    told = {name: said for name, (*_, said) in {**HOSTILE, **REFUSED}.items()}
    assert dict(rows("security", "Hostile quantised checkpoints")) == told


@pytest.mark.parametrize("damage", HOSTILE)
def test_parts_that_do_not_fit_are_one_error(damage: str, damaged: Callable[[str], Path]) -> None:
    """Indices out of range, missing parts and strange shapes or types are a CheckpointError that names the tensor."""
    case, last, change, expected = HOSTILE[damage]
    directory = damaged(case)

    def apply(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(f"{Q_PROJ}.{last}")
        if change is not None:
            tensors[f"{Q_PROJ}.{last}"] = change(tensor).contiguous()

    edit(directory, apply)
    message = refusal(directory)
    assert expected in message
    assert "\n" not in message


def test_a_matrix_that_is_stored_twice_is_refused(damaged: Callable[[str], Path]) -> None:
    """Which of a packed and a plain matrix wins would depend on the reader."""
    directory = damaged("gptq")
    edit(directory, lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.ones(64, 48)}))
    assert f"{Q_PROJ} is stored twice, as qweight and as weight" in refusal(directory)


def test_biases_of_zero_are_passed_over_and_others_are_not(damaged: Callable[[str], Path]) -> None:
    """AutoGPTQ writes a bias of zeros with every layer; one that adds something is unexpected."""
    directory = damaged("gptq")
    edit(directory, lambda tensors: tensors.update({f"{Q_PROJ}.bias": torch.zeros(64, dtype=torch.float16)}))
    assert load(directory).plan.architecture == "LlamaForCausalLM"
    edit(directory, lambda tensors: tensors[f"{Q_PROJ}.bias"].fill_(1))
    assert f"unexpected {Q_PROJ}.bias" in refusal(directory)
    edit(directory, lambda tensors: tensors.update({"model.norm.bias": torch.zeros(48)}))
    assert "unexpected model.norm.bias" in refusal(directory)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "bitsandbytes quantises when it loads: load",
    ),
    "mxfp4": (
        {"quant_method": "mxfp4"},
        "quant_method = 'mxfp4' is not supported; AWQ, GPTQ, compressed-tensors and fp8",
    ),
    "modelopt": ({"quant_method": "modelopt"}, "--quantization int8 to quantise it here"),
    "no method": ({"bits": 3}, "quant_method = 'unknown' is not supported"),
    "a method that is no name": ({"quant_method": ["gptq"]}, "quant_method = ['gptq'] is not supported"),
    "GPTQ of 3 bits": ({**GPTQ, "bits": 3}, "GPTQ of 3 bits is not supported; 2, 4, 8 are"),
    "GPTQ for Marlin": (
        {**GPTQ, "checkpoint_format": "marlin"},
        "checkpoint_format = 'marlin' is not supported; gptq, gptq_v2",
    ),
    "GPTQ without bits": ({"quant_method": "gptq"}, "bits is missing"),
    "AWQ for gemv": ({**AWQ, "version": "gemv_fast"}, "AWQ of 4 bits, version = 'gemv_fast' is not supported"),
    "AWQ of 3 bits": ({**AWQ, "bits": 3}, "AWQ of 3 bits"),
    "FP8 blocks": (
        {**FP8, "weight_block_size": [0, 128]},
        "weight_block_size = [0, 128]: expected two positive integers",
    ),
    "no groups": ({"quant_method": "compressed-tensors"}, "config_groups is missing"),
    "nvfp4": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": {"format": "nvfp4-pack-quantized", "weights": W4}},
        },
        "format = 'nvfp4-pack-quantized' is not supported; pack-quantized, int-quantized",
    ),
    "packed floats": (compressed_config(Compressed("pack-quantized", {**W4, "type": "float"})), "float of 4 bits"),
    "packed 3 bits": (
        compressed_config(Compressed("pack-quantized", {**W4, "num_bits": 3})),
        "int of 3 bits is not supported",
    ),
    "sparsity": (
        compressed_config(Compressed("pack-quantized", W4), sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config",
    ),
    "rotations": (
        compressed_config(Compressed("pack-quantized", W4), transform_config={"config_groups": {"R1": {}}}),
        "rotated weights",
    ),
    "blocks of two sizes": (
        compressed_config(
            *(Compressed("float-quantized", {**F8, "block_structure": [side, 128]}) for side in (64, 128))
        ),
        "blocks of several sizes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str, golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """Other methods, versions and variants are named, before any tensor is looked at."""
    directory = Path(shutil.copytree(golden("llama").directory, tmp_path / "model"))
    quantization, expected = REFUSED[name]
    config = json.loads((directory / "config.json").read_text())
    for place in ({"quantization_config": quantization}, {"compression_config": quantization}):
        (directory / "config.json").write_text(json.dumps({**config, **place}))
        assert expected in refusal(directory)
