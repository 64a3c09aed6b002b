"""AWQ, GPTQ and compressed-tensors checkpoints computed as stored: the weights, and whole models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import save_file

from tests.model.as_stored import check_as_stored
from tests.model.families import SHAPED, VOCAB, save
from tests.model.golden import Golden
from tests.model.paged import CPU
from tests.model.quantized_files import Compressed, Packer, awq, gptq, pack_with_order, quantize_checkpoint, without
from tests.model.test_quantized import AWQ, F8, GPTQ, W4, W8, Case, compressed, compressed_config, twin_of
from trio_llm.config import EngineConfig
from trio_llm.model.checkpoint.safetensors import open_checkpoint
from trio_llm.model.checkpoint.tensors import Checkpoint
from trio_llm.model.config import ModelConfig
from trio_llm.model.load import load_runner
from trio_llm.model.loading.loader import LoadedModel, inspect_model, load_model
from trio_llm.model.ops.matrices import Blocks, Dense, Stacked
from trio_llm.model.ops.torch_reference import dequantize

W8_ASYMMETRIC = {**W8, "symmetric": False}
V2_ORDERED = {**GPTQ, "desc_act": True, "checkpoint_format": "gptq_v2"}
ORDERED = compressed_config(Compressed("pack-quantized", {**W4, "actorder": "group"}))
W4_CASE = "compressed-tensors 4-bit"
CASES = {
    "awq": Case(awq(), AWQ, "AWQ 4-bit"),
    "awq-biases": Case(awq(32), {**AWQ, "group_size": 32}, "AWQ 4-bit", "qwen2"),
    "awq-experts": Case(awq(), AWQ, "AWQ 4-bit", "qwen3-moe"),
    "gptq": Case(gptq(), GPTQ, "GPTQ 4-bit"),
    "gptq-8": Case(gptq(8, symmetric=False), {**GPTQ, "bits": 8}, "GPTQ 8-bit"),
    "gptq-2": Case(gptq(2, symmetric=False), {**GPTQ, "bits": 2}, "GPTQ 2-bit"),
    "gptq-v2-act-order": Case(gptq(version=2, act_order=True, symmetric=False), V2_ORDERED, "GPTQ 4-bit"),
    "gptq-8-act-order-biases": Case(gptq(8, act_order=True), {**GPTQ, "bits": 8}, "GPTQ 8-bit", "qwen2"),
    "gptq-one-group": Case(without(gptq(group_size=None), "g_idx"), {**GPTQ, "group_size": -1}, "GPTQ 4-bit"),
    "gptq-experts": Case(gptq(), GPTQ, "GPTQ 4-bit", "mixtral"),
    "w4a16": compressed(W4_CASE, "pack-quantized", W4),
    "w4a16-asymmetric": compressed(W4_CASE, "pack-quantized", {**W4, "symmetric": False}),
    "w4a16-tensor": compressed(W4_CASE, "pack-quantized", {**W4, "strategy": "tensor", "group_size": None}),
    "w4a16-act-order": Case(pack_with_order, ORDERED, W4_CASE),
    "w4a16-experts": compressed(W4_CASE, "pack-quantized", W4, "mixtral"),
    "w2a16": compressed("compressed-tensors 2-bit", "pack-quantized", {**W4, "num_bits": 2}),
    "w8a16-packed": compressed("compressed-tensors 8-bit", "pack-quantized", W8_ASYMMETRIC),
    "w8a8": compressed("INT8", "int-quantized", W8),
    "w8a8-tensor": compressed("INT8", "int-quantized", {**W8, "strategy": "tensor"}),
    "w8a8-asymmetric": compressed("INT8", "int-quantized", W8_ASYMMETRIC),
    "w8a16-groups": compressed("INT8", "int-quantized", {**W8, "strategy": "group", "group_size": 16}),
}  # fmt: skip


def make(
    directory: Path, family: str, packer: Packer, config: dict[str, Any], **options: float
) -> tuple[Golden, dict[str, torch.Tensor]]:
    """Write a quantised checkpoint whose groups are whole; return transformers' logits and weights, widened."""
    torch.manual_seed(3)
    width = {"hidden_size": 64, "intermediate_size": 96} | ({"moe_intermediate_size": 32} if "moe" in family else {})
    oracle = SHAPED[family](**{**width, **options}).float().eval()
    plain = save(oracle, directory / "plain")
    widened = quantize_checkpoint(plain, directory / "model", lambda _: packer, config)
    prompts = [torch.randint(3, VOCAB, (n,)).tolist() for n in (33, 9)]
    return twin_of(directory / "twin", widened, Golden(plain, oracle, prompts, [], [])), widened


def load_as_stored(directory: Path) -> LoadedModel:
    """Load a checkpoint for the reference, or for the kernels that are chosen."""
    settings = EngineConfig(model=str(directory), block_size=4, dtype="float32")
    return load_model(inspect_model(settings, as_stored=True), CPU)


def check_weights(checkpoint: Checkpoint, widened: dict[str, torch.Tensor]) -> int:
    """Hold each matrix that is kept to its widened weights, and its template to it; return how many there are."""
    reader, count = checkpoint.open(), 0
    for name, info in checkpoint.tensors.items():
        if info.template is not None:
            stored, template = reader.read_stored(info), info.template()
            wide = dequantize(stored)
            wide = wide if stored.order is None else torch.empty_like(wide).index_copy_(1, stored.order, wide)
            torch.testing.assert_close(wide, widened[name], rtol=0, atol=0)
            assert (template.nbytes, template.fits(stored)) == (stored.nbytes, True)
            count += 1
    reader.close()
    return count


@pytest.mark.parametrize("case", CASES)
def test_stored_numbers_compute_what_widened_weights_do(case: str, tmp_path: Path) -> None:
    """Each weight is the independent dequantiser's, and the logits are transformers' on the widened ones."""
    packer, config, name, family = attrs.astuple(CASES[case], recurse=False)
    made, widened = make(tmp_path, family, packer, config)
    loaded = check_as_stored(lambda: load_as_stored(tmp_path / "model"), made, family)
    plan = loaded.plan
    assert plan.checkpoint is not None
    kept = sum(info.dtype == name for info in plan.checkpoint.tensors.values())
    assert check_weights(plan.checkpoint, widened) == kept > 0
    assert plan.kept_formats == {name: plan.stored_formats[name]}
    assert set(plan.stored_formats) == {name, "F32"}
    first = loaded.model.layers[0].attention.qkv  # type: ignore[attr-defined]
    assert isinstance(first, Blocks)
    assert (first.order is not None) == ("order" in case)


def test_groups_of_128_take_a_little_over_four_bits(tmp_path: Path) -> None:
    """The groups of published AWQ checkpoints: half a byte a weight, a scale and a zero point for each 128."""
    made, widened = make(
        tmp_path, "llama", awq(128), {**AWQ, "group_size": 128},
        hidden_size=128, intermediate_size=256, num_attention_heads=8, initializer_range=0.1,
    )  # fmt: skip
    loaded = check_as_stored(lambda: load_as_stored(tmp_path / "model"), made, "llama")
    assert loaded.plan.checkpoint is not None
    assert check_weights(loaded.plan.checkpoint, widened) == 3 * 7
    down = loaded.model.layers[0].mlp.down  # type: ignore[attr-defined]
    assert down.nbytes == 128 * 256 * (0.5 + 3 / 128)


def test_layers_of_different_orders_are_stacked(tmp_path: Path) -> None:
    """Queries, keys and values whose inputs are in different orders are multiplied one by one."""
    ordered = gptq(act_order=True)

    def by_outputs(weight: torch.Tensor) -> Any:
        return (ordered if len(weight) == 64 else gptq())(weight)

    made, _ = make(tmp_path, "llama", by_outputs, {**GPTQ, "desc_act": True})
    loaded = check_as_stored(lambda: load_as_stored(tmp_path / "model"), made, "llama")
    assert isinstance(loaded.model.layers[0].attention.qkv, Stacked)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "case",
    [
        Case(awq(8), {**AWQ, "group_size": 8}, "AWQ 4-bit"),
        Case(gptq(group_size=24), {**GPTQ, "group_size": 24}, "GPTQ 4-bit"),
        compressed("FP8", "float-quantized", F8),
    ],
)
def test_what_kernels_cannot_use_is_widened_and_said_so(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Groups of 8, groups that the inputs are no multiple of, and FP8 are computed in the model's type."""
    make(tmp_path, "llama", case.packer, case.config)
    loaded = load_as_stored(tmp_path / "model")
    assert loaded.plan.kept_formats == {}
    assert isinstance(loaded.model.layers[0].attention.qkv, Dense)  # type: ignore[attr-defined]
    with caplog.at_level(logging.INFO):
        load_runner(EngineConfig(model=str(tmp_path / "model"), dtype="float32", device="cpu"))
    assert f"computed in float32, not as stored, for lack of a kernel: {case.name}" in caplog.text
    assert "computed as stored:" not in caplog.text


def test_experts_with_an_order_are_widened(tmp_path: Path) -> None:
    """Experts share their activations, which are in one order; what is beside them is kept."""
    made, _ = make(tmp_path, "mixtral", gptq(act_order=True), {**GPTQ, "desc_act": True})
    loaded = check_as_stored(lambda: load_as_stored(tmp_path / "model"), made, "mixtral")
    assert 0 < loaded.plan.kept_formats["GPTQ 4-bit"] < loaded.plan.stored_formats["GPTQ 4-bit"]
    assert isinstance(loaded.model.layers[0].mlp.experts.down, Dense)  # type: ignore[attr-defined]


def test_log_table_and_description_have_what_is_computed_as_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU with native kernels a checkpoint's format is what the weights are in memory."""
    make(tmp_path, "llama", awq(), AWQ)
    with caplog.at_level(logging.INFO):
        info = load_runner(EngineConfig(model=str(tmp_path / "model"), dtype="float32", device="cpu")).info
    assert "model: computed as stored: AWQ 4-bit (" in caplog.text
    assert "not as stored" not in caplog.text
    assert info.kept_formats == {"AWQ 4-bit": info.stored_formats["AWQ 4-bit"]}
    assert "AWQ 4-bit and float32; the files have " in info.memory_table


def test_scales_of_bfloat16_are_kept_in_float32(tmp_path: Path) -> None:
    """compressed-tensors' scales have the type of the original weights; each value is the same in float32."""
    packer = Compressed("pack-quantized", W4)
    parts, _ = packer(torch.randn(64, 96, generator=torch.Generator().manual_seed(2)).bfloat16())
    assert parts["weight_scale"].dtype == torch.bfloat16
    checkpoint = _one_matrix(parts, compressed_config(packer), tmp_path)
    reader, info = checkpoint.open(), checkpoint.tensors["a.weight"]
    assert reader.read_stored(info).scale.dtype == torch.float32
    assert check_weights(checkpoint, {"a.weight": reader.read(info)}) == 1


def _one_matrix(parts: dict[str, torch.Tensor], quantization: dict[str, Any], directory: Path) -> Checkpoint:
    save_file({f"a.{name}": part.contiguous() for name, part in parts.items()}, directory / "model.safetensors")
    return open_checkpoint(directory, multimodal=False, quantization=ModelConfig(quantization, "config.json"))
