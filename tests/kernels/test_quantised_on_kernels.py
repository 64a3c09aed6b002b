"""Checkpoints of 4-bit weights computed as stored on the simulated kernels, beside what their widened weights give."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from cuda_kernels.launch import using
from tests.gguf.files import write
from tests.model.families import SHAPED
from tests.model.paged import CPU, Paged
from tests.model.quantized_files import awq, gptq
from tests.model.test_quantized import AWQ, GPTQ
from tests.model.test_quantized_as_stored import make
from tests.model.test_reduced_precision import errors
from tests.model_runner.tape import Tapes
from tests.model_runner.test_gpu_loading import PretendedGpu
from tools.ptx_simulator import SimulatedLauncher
from trio_llm.config import EngineConfig
from trio_llm.model import load
from trio_llm.model.load import load_runner
from trio_llm.model.loading.loader import LoadedModel, inspect_model, load_model
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops import seam as ops
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.model.ops.matrices import Blocks, Dense, Matrix, Tiles

HEADS = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, **HEADS}
CASES = {
    "gptq-act-order": ("llama", gptq(act_order=True, group_size=32), {**GPTQ, "desc_act": True}),
    "awq-biases": ("qwen2", awq(32), {**AWQ, "group_size": 32}),
    "gptq-experts": ("mixtral", gptq(group_size=32), GPTQ),
}


@pytest.fixture
def on_kernels() -> Generator[Dispatch]:
    """Run the CUDA kernels on CPU tensors, simulated, and tell what ran where."""
    with using(SimulatedLauncher()), dispatching(Dispatch("cuda", ops_cuda, "cpu")) as counting:
        yield counting


def load_on_kernels(path: Path) -> LoadedModel:
    """Load a checkpoint as on a GPU, in bfloat16."""
    settings = EngineConfig(model=str(path), block_size=16, dtype="bfloat16")
    return load_model(inspect_model(settings, as_stored=True, keeps=ops_cuda.keeps), CPU)


def check_logits(loaded: LoadedModel, prompts: list[list[int]], want: list[torch.Tensor]) -> None:
    """Hold a ragged prefill and a decode to logits in float32, within what bfloat16 costs."""
    paged, (a, b) = Paged(loaded, 2), prompts
    got = [*paged.step([(0, a[:-1]), (1, b)]), *paged.step([(0, a[-1:])])]
    rms, kl = errors(torch.cat([want[0][:-1], want[1], want[0][-1:]]), torch.cat(got))
    assert rms < 0.12 and kl < 0.006


@pytest.mark.parametrize(
    "case", ["gptq-act-order", *(pytest.param(name, marks=pytest.mark.kernels_full) for name in list(CASES)[1:])]
)
def test_models_match_their_widened_weights(case: str, tmp_path: Path, on_kernels: Dispatch) -> None:
    """All linear layers but experts are multiplied as stored, and nothing falls back."""
    family, packer, config = CASES[case]
    made, _ = make(tmp_path, family, packer, config, **SHAPE)
    loaded = load_on_kernels(tmp_path / "model")
    check_logits(loaded, made.prompts, made.logits)
    layer = loaded.model.layers[0]  # type: ignore[attr-defined]
    attention: list[Matrix] = [layer.attention.qkv, layer.attention.out]
    assert all(isinstance(one, Tiles) for one in attention)
    (name,) = loaded.plan.kept_formats
    of_experts = loaded.plan.stored_formats[name] - loaded.plan.kept_formats[name]
    routers = 2 if family == "mixtral" else 0
    assert (of_experts > 0) == (routers > 0)
    if routers:
        assert isinstance(layer.mlp.experts.down, Dense)
    assert {how for _, how, _ in on_kernels.calls} == {"cuda", "cublas"}
    assert on_kernels.calls["linear", "cublas", "many rows"] == 1 + routers  # the head in the first step, not quantised


def test_a_gguf_file_with_a_tied_head(tmp_path: Path, on_kernels: Dispatch) -> None:
    """Minima; the embedding is looked up in the tiles of the head."""
    torch.manual_seed(3)
    model = SHAPED["llama"](**SHAPE, tie_word_embeddings=True).float().eval()
    path = tmp_path / "model.gguf"
    write(model, path, lambda _: gguf.GGMLQuantizationType.Q4_1)
    twin = load_model(inspect_model(EngineConfig(model=str(path), block_size=16, dtype="float32")), CPU)
    prompts = [torch.randint(3, twin.model.vocab_size, (n,)).tolist() for n in (20, 3)]
    with dispatching(Dispatch()):
        want = [Paged(twin, 1).step([(0, prompt)])[0] for prompt in prompts]
    loaded = load_on_kernels(path)
    check_logits(loaded, prompts, want)
    head: Matrix = loaded.model.head  # type: ignore[attr-defined]
    assert isinstance(head, Tiles) and head.minimum is not None
    assert loaded.plan.weight_bytes < 0.4 * inspect_model(EngineConfig(model=str(path), dtype="bfloat16")).weight_bytes
    assert {how for _, how, _ in on_kernels.calls} == {"cuda"}


def test_many_rows_are_multiplied_by_widened_weights(on_kernels: Dispatch) -> None:
    """Beyond what the kernel takes cuBLAS gets the weights in the type of the inputs, which the counts say."""
    torch.manual_seed(4)
    blocks = Blocks(torch.randint(0, 256, (64, 32), dtype=torch.uint8), torch.rand(64, 2).half() / 50,
                    order=torch.randperm(64), bias=torch.randn(64).bfloat16())  # fmt: skip
    x, tiles = torch.randn(257, 64).bfloat16(), ops.pack(blocks)
    assert isinstance(tiles, Tiles)
    many, gated, few = ops.linear(x, tiles), ops.gated_linear(x, tiles, "silu"), ops.linear(x[:9], tiles)
    for got, rows in ((many, x), (few, x[:9])):
        torch.testing.assert_close(got, ops_torch.linear(rows, blocks), rtol=0.02, atol=0.02)
    torch.testing.assert_close(gated, ops_torch.act_and_mul(many, "silu"), rtol=0.02, atol=0.02)
    assert on_kernels.calls == {
        ("pack", "cuda", ""): 1, ("linear", "cublas", "many rows"): 1, ("gated_linear", "cublas", "many rows"): 1,
        ("linear", "cuda", ""): 1,
    }  # fmt: skip


def test_gates_that_fill_no_tile_are_multiplied_first(on_kernels: Dispatch) -> None:
    """A gate of 48 outputs ends within a tile: the activation is a kernel of its own."""
    blocks = Blocks(torch.randint(0, 256, (96, 32), dtype=torch.uint8), torch.rand(96, 2).half() / 50)
    x, tiles = torch.randn(3, 64).bfloat16(), Tiles.of(blocks)
    expected = ops_torch.act_and_mul(ops_torch.linear(x, blocks), "silu")
    torch.testing.assert_close(ops.gated_linear(x, tiles, "silu"), expected, rtol=0.03, atol=0.03)
    assert on_kernels.calls == {("gated_linear", "cuda", ""): 1}


def test_graphs_may_contain_look_ups_and_many_rows(on_kernels: Dispatch) -> None:
    """Neither sends data from the host: a capture refuses that. A replay looks up and multiplies what is there then."""
    torch.manual_seed(5)
    blocks = Blocks(torch.randint(0, 256, (64, 32), dtype=torch.uint8), torch.rand(64, 2).half() / 50)
    tiles, x, ids = Tiles.of(blocks), torch.zeros(257, 64).bfloat16(), torch.zeros(70, dtype=torch.int64)
    out: list[torch.Tensor] = []

    def work() -> None:
        out[:] = [ops.embedding(ids, tiles, x.dtype), ops.embedding(ids, blocks, x.dtype), ops.linear(x, tiles)]

    replay = Tapes().capture(work)
    x.copy_(torch.randn(257, 64))
    ids.copy_(torch.randint(0, 64, (70,)))
    replay()
    rows = ops_torch.dequantize(blocks).bfloat16()[ids]
    assert torch.equal(out[0], rows) and torch.equal(out[1], rows)
    torch.testing.assert_close(out[2], ops_torch.linear(x, blocks), rtol=0.02, atol=0.02)
    assert {how for _, how, _ in on_kernels.calls} == {"cublas"}


def test_gates_of_fp8_are_multiplied_first(on_kernels: Dispatch) -> None:
    """The scaled product has no activation: that is a kernel of its own, and no norm is fused with the product."""
    torch.manual_seed(5)
    blocks = Blocks(torch.randn(64, 64).to(torch.float8_e4m3fn), torch.rand(64, 1) / 10)
    x, norm, matrix = torch.randn(3, 64).bfloat16(), torch.ones(64).bfloat16(), ops.pack(blocks)
    before = ops.AddNorm(x, None, norm, 1e-6)
    got = ops.gated_linear(before, matrix, "silu")
    expected = ops_torch.act_and_mul(ops_torch.linear(ops_torch.rms_norm(x, norm, 1e-6), blocks), "silu")
    torch.testing.assert_close(got, expected, rtol=0.2, atol=0.05 * float(expected.abs().max()))
    assert on_kernels.calls == {
        ("pack", "cuda", ""): 1, ("rms_norm", "cuda", ""): 1, ("gated_linear", "torch", "FP8 weights"): 1,
    }  # fmt: skip


def test_the_log_and_the_table_say_what_is_kept_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes of 4-bit weights are those of the file; `/metrics` gets them, and the memory table names the format."""
    make(tmp_path, "llama", awq(32), {**AWQ, "group_size": 32}, **SHAPE)
    caplog.set_level("INFO")
    monkeypatch.setattr(load, "open_device", lambda _: PretendedGpu())
    monkeypatch.setattr(load, "find_kernels", lambda *_: ops_cuda)
    few: dict[str, Any] = {"max_model_len": 32, "max_num_batched_tokens": 16, "max_batch_size": 1}
    settings = EngineConfig(model=str(tmp_path / "model"), num_kv_blocks=8, enforce_eager=True, dtype="bfloat16", **few)
    with using(SimulatedLauncher()):
        info = load_runner(settings).info
    assert info.kept_formats == {"AWQ 4-bit": info.stored_formats["AWQ 4-bit"]}
    assert "computed as stored: AWQ 4-bit" in caplog.text and "not as stored" not in caplog.text
    assert "AWQ 4-bit and bfloat16; the files have " in info.memory_table
