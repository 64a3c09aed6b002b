"""FP8 checkpoints on a GPU: which are kept, what torch's scaled product is given, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from tests.model.golden import paged_logits
from tests.model.quantized_files import fp8_blocks
from tests.model.test_quantized import F8, Case, compressed, edit
from tests.model.test_quantized_as_stored import check_weights, make
from tests.model.test_reduced_precision import errors
from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError
from trio_llm.model.loading.loader import LoadedModel, inspect_model, load_model
from trio_llm.model.ops import cuda, fp8, torch_reference
from trio_llm.model.ops import seam as ops
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.model.ops.matrices import Blocks, Dense, Fp8, Matrix
from trio_llm.model.ops.torch_reference import dequantize

CPU = torch.device("cpu")
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
WIDE = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 128,
        "num_attention_heads": 4, "num_key_value_heads": 1}  # fmt: skip
CASES = {
    "outputs": compressed("FP8", "float-quantized", F8),
    "tensor": compressed("FP8", "float-quantized", {**F8, "strategy": "tensor"}),
    "blocks": Case(fp8_blocks(128, 128), BLOCKS, "FP8"),
}


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, ...]]]:
    """Let the device have all scaled products: torch's own on a CPU, and what block scales are defined as."""
    given: list[tuple[Tensor, ...]] = []
    product = torch._scaled_mm

    def recorded(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        given.append((a, b, scale_a, scale_b))
        if scale_a.shape[1] == 1:
            return product(a, b, scale_a.contiguous(), scale_b.contiguous(), out_dtype=out_dtype)
        of_a = scale_a.double().repeat_interleave(128, 1)
        of_b = scale_b.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        return ((a.double() * of_a) @ (b.double() * of_b)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", recorded)
    monkeypatch.setattr(fp8, "can_multiply", lambda *, has_blocks: True)
    return given


def load(path: Path, dtype: Any = "bfloat16") -> LoadedModel:
    """Load a checkpoint as on a GPU that has scaled products."""
    settings = EngineConfig(model=str(path), block_size=4, dtype=dtype)
    return load_model(inspect_model(settings, as_stored=True, keeps=cuda.keeps), CPU)


@pytest.mark.parametrize(("scales", "dtype"), [(1, torch.bfloat16), (1, torch.float16), (4, torch.bfloat16)])
def test_the_product_gets_what_it_wants(scales: int, dtype: torch.dtype, scaled: list[tuple[Tensor, ...]]) -> None:
    """Rows of FP8 with their largest at 448, weights by columns, and scales in the layout that torch checks."""
    torch.manual_seed(1)
    x, numbers = torch.randn(3, 512).to(dtype), torch.randn(256, 512).to(torch.float8_e4m3fn)
    scale = torch.rand(2 if scales > 1 else 256, scales).repeat_interleave(128 if scales > 1 else 1, 0) + 0.1
    blocks = Blocks(numbers, scale, bias=torch.randn(256).to(dtype))
    out = fp8.linear(x, Fp8.of(blocks))
    ((a, b, of_a, of_b),) = scaled
    assert (a.dtype, a.shape, a.stride()) == (torch.float8_e4m3fn, (3, 512), (512, 1))
    assert (b.dtype, b.shape, b.stride()) == (torch.float8_e4m3fn, (512, 256), (1, 512))
    assert of_a.dtype == of_b.dtype == torch.float32
    if scales == 1:
        assert (of_a.shape, of_b.shape) == ((3, 1), (1, 256)) and of_a.is_contiguous() and of_b.is_contiguous()
    else:
        assert (of_a.shape, of_a.stride()) == ((3, 4), (1, 3))
        assert (of_b.shape, of_b.stride()) == ((4, 2), (1, 4))
    groups = a.float().unflatten(1, (scales, -1))
    assert torch.equal(groups.abs().amax(-1), torch.full((3, scales), 448.0))
    torch.testing.assert_close((groups * of_a[..., None]).flatten(1), x.float(), rtol=2**-4, atol=1e-2)
    rounded = (groups.double() * of_a[..., None].double()).flatten(1)
    assert blocks.bias is not None
    expected = rounded @ dequantize(blocks).double().T + blocks.bias.double()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=0.02 * float(expected.abs().max()))


def test_rows_of_zeros_stay_zeros() -> None:
    """A row without a largest value has a scale all the same, and no NaN comes of it."""
    rounded, scale = fp8.quantize_rows(torch.zeros(2, 128), 128)
    assert not rounded.float().any() and (scale > 0).all()


@pytest.mark.parametrize("case", CASES)
def test_models_are_what_their_widened_weights_are(case: str, tmp_path: Path, scaled: list[tuple[Tensor, ...]]) -> None:
    """Each weight is as stored, and logits differ by what FP8 activations cost; every product is counted."""
    packer, config, name, _ = attrs.astuple(CASES[case], recurse=False)
    made, widened = make(tmp_path, "llama", packer, config, **WIDE)
    loaded = load(tmp_path / "model")
    plan = loaded.plan
    assert plan.kept_formats == {name: plan.stored_formats[name]}
    assert plan.checkpoint is not None and check_weights(plan.checkpoint, widened) == 7
    assert plan.weight_bytes < 0.6 * inspect_model(plan.engine).weight_bytes
    with dispatching(Dispatch("auto", cuda, "cpu")) as counting:
        packed = load(tmp_path / "model")
        assert isinstance(packed.model.layers[0].mlp.down, Fp8)  # type: ignore[attr-defined]
        counting.calls.clear()
        x = torch.randn(2, 512).bfloat16()
        ops.linear(x, packed.model.layers[0].mlp.down)  # type: ignore[attr-defined]
    assert counting.calls == {("linear", "torch", "FP8 weights"): 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "WHY_NOT", {name: cuda.WHY_NOT[name] for name in ("pack", "linear")})
        with dispatching(Dispatch("auto", cuda, "cpu")):
            got = paged_logits(packed, made, None)
    with pytest.MonkeyPatch.context() as patch:
        exact = torch_reference.linear
        patch.setattr(torch_reference, "linear", lambda x, matrix: exact(_rounded(x, matrix), matrix))
        defined = paged_logits(loaded, made, None)
    # Activations are rounded alike, but where a product's last bit differs one goes the other way. Measured: 0.06.
    assert errors(defined, got)[0] < 0.09
    assert errors(torch.cat(made.logits), got)[0] < 0.25  # measured: 0.13 to 0.15, of logits up to 5
    assert len(scaled) == 4 + 1


def _rounded(x: Tensor, matrix: Matrix) -> Tensor:
    """Return activations as the scaled product gets them."""
    if not isinstance(matrix, Blocks):
        return x
    size = x.shape[1] // matrix.scale.shape[1]
    rounded, scale = fp8.quantize_rows(x, size)
    return (rounded.float().unflatten(1, (-1, size)) * scale[..., None]).flatten(1).to(x.dtype)


@pytest.mark.parametrize(
    ("shape", "groups", "has_blocks", "kept"),
    [((64, 32), 1, False, True), ((72, 32), 1, False, False), ((64, 40), 1, False, False), ((128, 512), 4, True, True),
     ((128, 640), 5, True, False)],
)  # fmt: skip
def test_shapes_that_the_product_takes(
    shape: tuple[int, int], groups: int, has_blocks: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiples of 16, and with blocks of 512 inputs; on a device that has no such product nothing is kept."""
    matrix = Blocks(torch.empty(shape, dtype=torch.float8_e4m3fn), torch.ones(shape[0], groups))
    asked: list[bool] = []
    monkeypatch.setattr(fp8, "can_multiply", lambda *, has_blocks: not asked.append(has_blocks))
    assert cuda.keeps(matrix, torch.bfloat16, False) is kept
    assert asked == ([has_blocks] if kept else [])
    assert not cuda.keeps(matrix, torch.float32, False) and not cuda.keeps(matrix, torch.bfloat16, True)
    monkeypatch.setattr(fp8, "can_multiply", lambda *, has_blocks: False)
    assert not cuda.keeps(matrix, torch.bfloat16, False)


@pytest.mark.parametrize(("capability", "error", "found"), [
    ((8, 6), None, False), ((8, 9), None, True), ((9, 0), ValueError("Invalid scaling configuration."), False),
    ((10, 0), RuntimeError("no"), False),
])  # fmt: skip
def test_what_a_device_has_is_tried(
    capability: tuple[int, int], error: Exception | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From compute capability 8.9 on, if a small product comes out right; a refusal means no."""

    def product(a: Tensor, b: Tensor, *_: Tensor, out_dtype: torch.dtype) -> Tensor:
        if error is not None:
            raise error
        return torch.full((len(a), b.shape[1]), b.shape[0], dtype=out_dtype)

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))  # noqa: PLW0108 - without the device
    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for has_blocks in (False, True):
        assert fp8.can_multiply.__wrapped__(has_blocks=has_blocks) is found


def test_a_nan_is_found(tmp_path: Path, scaled: list[tuple[Tensor, ...]]) -> None:
    """A number that is none is an error that names the tensor, as in other checkpoints."""
    make(tmp_path, "llama", CASES["outputs"].packer, CASES["outputs"].config, **WIDE)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"].view(torch.uint8)[3, 5] = 0xFF

    edit(tmp_path / "model", spoil)
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight: holds NaN"):
        load(tmp_path / "model")
    assert scaled == []


def test_on_a_cpu_nothing_changes(tmp_path: Path) -> None:
    """Native kernels and the reference get FP8 widened."""
    make(tmp_path, "llama", CASES["outputs"].packer, CASES["outputs"].config)
    settings = EngineConfig(model=str(tmp_path / "model"), dtype="float32")
    loaded = load_model(inspect_model(settings, as_stored=True), CPU)
    assert loaded.plan.kept_formats == {}
    assert isinstance(loaded.model.layers[0].mlp.down, Dense)  # type: ignore[attr-defined]
