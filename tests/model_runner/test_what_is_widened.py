"""Which settings leave quantised weights as they are stored, and what the log says where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from cpu_kernels.blocks import BlockKind
from tests.gguf.files import write
from tests.model.families import SHAPED
from tests.model_runner.test_gpu_loading import PretendedGpu
from trio_llm.config import EngineConfig
from trio_llm.model import load
from trio_llm.model.load import load_runner
from trio_llm.model.loading.loader import inspect_model
from trio_llm.model.ops import cuda
from trio_llm.model.ops.matrices import Panels


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small GGUF file of 4-bit blocks."""
    torch.manual_seed(3)
    model = SHAPED["llama"](hidden_size=64, intermediate_size=96)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(model.float(), path, lambda _: gguf.GGMLQuantizationType.Q4_1)
    return path


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_blocks_are_kept_with_every_dtype(file: Path, dtype: Any, caplog: pytest.LogCaptureFixture) -> None:
    """--dtype is that of activations, norms and the KV cache: all matrices are multiplied as the file has them."""
    caplog.set_level("INFO")
    runner = load_runner(EngineConfig(model=str(file), dtype=dtype, device="cpu", num_kv_blocks=4))
    layer = runner._model.layers[0]  # type: ignore[attr-defined]
    for matrix in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
        assert isinstance(matrix, Panels)
        assert isinstance(matrix.kind, BlockKind)
    assert runner.info.dtype == ("bfloat16" if dtype == "auto" else dtype)
    assert runner.info.kept_formats == {"Q4_1": runner.info.stored_formats["Q4_1"]}
    assert "computed as stored: Q4_1" in caplog.text
    assert "not as stored" not in caplog.text
    runner.close()


class LoggedError(Exception):
    """Ends a load after its log."""


@pytest.mark.parametrize(
    ("settings", "mode", "as_stored", "said"),
    [
        ({"quantization": "int8"}, "auto", True, "int8, not as stored, with --quantization int8: "),
        ({"quantization": "int8-weights"}, "auto", True, "int8, not as stored, with --quantization int8-weights: "),
        ({"tensor_parallel_size": 2}, "auto", True, "bfloat16, not as stored, with --tensor-parallel-size 2: "),
        ({"dtype": "float32"}, "reference", True, "float32, not as stored, with TRIO_LLM_KERNELS=reference: "),
        ({"dtype": "float32"}, "none", True, "float32, not as stored, without native kernels: "),
        ({"dtype": "float32"}, "auto", False, "float32, not as stored, to be compared in full precision: "),
        ({"dtype": "float32"}, "gpu", True, "float32, not as stored, on a GPU: "),
    ],
)
def test_the_log_says_why_blocks_are_widened(
    file: Path,
    settings: dict[str, Any],
    mode: str,
    as_stored: bool,
    said: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each reason is one line, with the bytes of each format in the file and those of all weights in memory."""

    def stop(*_: object) -> None:
        raise LoggedError

    monkeypatch.setattr(load, "_other_ranks", stop)
    monkeypatch.setenv("TRIO_LLM_KERNELS", "reference" if mode == "reference" else "auto")
    if mode == "none":
        monkeypatch.setattr(load, "find_kernels", lambda *_: None)
    if mode == "gpu":
        monkeypatch.setattr(load, "open_device", lambda _: PretendedGpu())
        monkeypatch.setattr(load, "find_kernels", lambda *_: cuda)
    config = EngineConfig(model=str(file), device="cpu", num_kv_blocks=4, **settings)
    with pytest.raises(LoggedError):
        load_runner(config, as_stored=as_stored)
    plan = inspect_model(config)
    stored, taken = (nbytes / 1e6 for nbytes in (plan.stored_formats["Q4_1"], plan.weight_bytes))
    expected = f"{said}Q4_1 ({stored:.0f} MB); all weights take {taken:.0f} MB in memory"
    assert expected in caplog.text
    assert "computed as stored" not in caplog.text


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("auto", "draft model model.gguf: computed as stored: Q4_1 ("),
        ("reference", "draft model model.gguf: computed in bfloat16, not as stored, with TRIO_LLM_KERNELS=reference: "),
    ],
)
def test_the_log_says_the_same_of_a_draft_model(
    file: Path, mode: str, said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a line of its own, and the model keeps its."""
    caplog.set_level("INFO")
    monkeypatch.setenv("TRIO_LLM_KERNELS", mode)
    drafts: dict[str, Any] = {"spec_method": "draft_model", "spec_model": str(file), "dtype": "bfloat16"}
    load_runner(EngineConfig(model=str(file), device="cpu", num_kv_blocks=4, **drafts)).close()
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith(said) for line in lines) == 1
    assert sum(line.startswith(said.removeprefix("draft model ")) for line in lines) == 1
