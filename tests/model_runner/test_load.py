from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.families import make_oracle, save
from trio_llm.config import EngineConfig
from trio_llm.core.block_math import max_live_blocks
from trio_llm.errors import ConfigError
from trio_llm.messages import Admission, StepPlan
from trio_llm.model import load
from trio_llm.model.load import load_runner
from trio_llm.model.loading.loader import inspect_model
from trio_llm.params import SamplingParams

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "eos_token_id": [2, 3],
    "dtype": "bfloat16",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model of random weights, no larger than a config.json."""
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2], "temperature": 0.6}))
    return path


def settings(directory: Path, **options: Any) -> EngineConfig:
    """Return settings that need no weights on disk."""
    return EngineConfig(model=str(directory), load_format="dummy", **options)


def test_the_runner_says_what_it_serves(directory: Path) -> None:
    """ModelInfo carries the model's own name, sizes, limits and end-of-sequence ids, and the pool as it was taken."""
    runner = load_runner(settings(directory, num_kv_blocks=10))
    info = runner.info
    assert (info.name, info.architecture, info.dtype) == ("tiny", "Qwen3ForCausalLM", "bfloat16")
    assert (info.vocab_size, info.hidden_size, info.max_model_len) == (128, 48, 256)
    assert info.eos_token_ids == (3, 2)
    assert info.default_sampling == {"temperature": 0.6}
    assert info.num_kv_blocks * info.block_bytes == runner._kv.nbytes
    assert info.block_bytes == 3 * 16 * 2 * 2 * 16 * 2  # layers, tokens, k and v, heads, head size, bytes
    runner.close()


@pytest.mark.parametrize(
    ("config", "tokenizers", "expected", "said"),
    [
        ([3, 2], None, (3, 2), None),
        ([3, 2], 9, (9, 3, 2), None),
        ([3, 2], 2, (2, 3), None),
        (None, 9, (9,), None),
        ([3, 128], 500, (3,), "end tokens [500, 128] are ignored: the model has 128 tokens"),
        (None, None, (), "the model names no end token"),
    ],
)
def test_end_tokens_are_those_of_the_model_and_of_the_tokenizer(
    directory: Path,
    caplog: pytest.LogCaptureFixture,
    config: list[int] | None,
    tokenizers: int | None,
    expected: tuple[int, ...],
    said: str | None,
) -> None:
    """The tokenizer's comes first; ids that the model does not have are left out, and the log says so."""
    (directory / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": config}))
    (directory / "generation_config.json").unlink()
    runner = load_runner(settings(directory, num_kv_blocks=10), eos_token_id=tokenizers)
    assert runner.info.eos_token_ids == expected
    assert not caplog.messages if said is None else any(said in message for message in caplog.messages)
    runner.close()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_is_chosen_by_the_settings(directory: Path, dtype: str) -> None:
    """What --dtype names is what the pool and the model hold, and it runs."""
    runner = load_runner(settings(directory, num_kv_blocks=4, dtype=dtype))
    assert runner.info.dtype == dtype
    assert runner._kv.layers[0].k.dtype == getattr(torch, dtype)
    admitted = (Admission(0, (5, 6), 2, SamplingParams(temperature=0)),)
    result = runner.step(StepPlan(1, (), admitted, (0,), (0,), (2,), (5, 6), (True,), (((0, (1,)),),)))
    assert len(result.token_ids[0]) == 1
    assert result.seconds > 0


def test_the_budget_is_what_is_taken(directory: Path) -> None:
    """Weights and pool are stated to the byte, and the table names every part."""
    runner = load_runner(settings(directory, num_kv_blocks=100))
    budget = runner.budget
    assert budget.kv_bytes == runner._kv.nbytes
    attention, mlp, norms = 48 * (64 + 32 + 32) + 64 * 48, 3 * 48 * 80, 2 * 48 + 2 * 16
    assert budget.weight_bytes == 2 * (2 * 128 * 48 + 3 * (attention + mlp + norms) + 48)
    text = budget.render()
    for part in ("weights", "KV cache", "100 blocks", "group 0: 3 layers, all tokens", "workspace", "total", "GiB"):
        assert part in text


def test_what_loading_takes_beside_the_weights_must_fit_too(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the largest matrix is packed from is in the table, and refused if it does not fit."""
    (directory / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 20_000}))
    options = settings(directory, num_kv_blocks=2, max_batch_size=1, max_num_batched_tokens=16)
    runner = load_runner(options)
    budget = runner.budget
    assert budget.loading_bytes == 20_000 * 48 * 2 > budget.kv_bytes + budget.workspace_bytes
    assert budget.total_bytes == budget.weight_bytes + budget.loading_bytes
    assert f"{budget.loading_bytes:,} bytes  estimated, before the KV cache" in budget.render()
    runner.close()
    monkeypatch.setattr(load, "available_bytes", lambda: budget.total_bytes)
    load_runner(options).close()
    monkeypatch.setattr(load, "available_bytes", lambda: budget.total_bytes - 1)
    with pytest.raises(ConfigError, match=r"weights 0\.00 \+ loading 0\.00 GiB do not fit"):
        load_runner(options)


REFUSED = [
    ({"tensor_parallel_size": 3}, "tensor_parallel_size = 3: does not divide 4 attention heads"),
    ({"device": "cuda"}, "device = 'cuda': no CUDA device is available .*; use --device cpu"),
    ({"max_model_len": 257}, "max_model_len = 257: at most 256"),
    ({"num_kv_blocks": 10**9}, "--kv-blocks"),
    ({"max_num_batched_tokens": 10**12}, r"--max-num-batched-tokens 2048.* would$"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], says: str
) -> None:
    """Settings that do not fit model or machine are one error that names the setting and the limit."""
    monkeypatch.delattr(load, "load_model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=says):
        load_runner(settings(directory, **options))


def test_the_number_of_blocks_that_would_fit_does(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal's advice can be followed to the letter, and one block more is refused again."""
    monkeypatch.setattr(load, "available_bytes", lambda: 40 * 2**20)
    with pytest.raises(ConfigError, match=r"do not fit in the 0\.04 GiB available; --kv-blocks \d+ would") as caught:
        load_runner(settings(directory, num_kv_blocks=10**6))
    blocks = int(caught.value.allowed.split("--kv-blocks ")[1].split()[0])
    load_runner(settings(directory, num_kv_blocks=blocks)).close()
    with pytest.raises(ConfigError):
        load_runner(settings(directory, num_kv_blocks=blocks + 1))


@pytest.mark.parametrize(
    ("available_kib", "advice"),
    [
        (49_152, "--max-num-batched-tokens 2048"),
        (6144, "--max-num-batched-tokens 512 --max-batch-size 64"),
        (1200, "--max-num-batched-tokens 128 --max-batch-size 16"),
    ],
)
def test_the_flags_that_would_fit_do(
    directory: Path, monkeypatch: pytest.MonkeyPatch, available_kib: int, advice: str
) -> None:
    """Where fewer blocks are not enough, the flags that are named start the model as they stand."""
    monkeypatch.setattr(load, "available_bytes", lambda: available_kib * 2**10)
    with pytest.raises(ConfigError, match=f"{advice}.* would$") as caught:
        load_runner(settings(directory, max_num_batched_tokens=2**16))
    words = caught.value.allowed.split("; ")[1].removesuffix(" would").split()
    names = {"kv_blocks": "num_kv_blocks"}
    flags = {
        flag.removeprefix("--").replace("-", "_"): int(value)
        for flag, value in zip(words[::2], words[1::2], strict=True)
    }
    load_runner(settings(directory, **{names.get(name, name): value for name, value in flags.items()})).close()


@pytest.mark.parametrize(
    ("omp", "small", "options", "threads"),
    [
        (None, False, {}, 6),
        (None, True, {}, 1),
        ("4", False, {}, 3),
        ("4", True, {}, 3),
        ("4", True, {"cpu_threads": 2}, 2),
        (None, False, {"cpu_threads": 9}, 9),
    ],
)
def test_threads_are_those_of_the_setting_the_variable_or_the_machine(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    omp: str | None,
    small: bool,
    options: dict[str, int],
    threads: int,
) -> None:
    """The setting wins, then OMP_NUM_THREADS; else one for weights in a core's cache, all usable cores for others."""
    caplog.set_level("INFO")
    asked: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(load, "_TORCH_THREADS", 3)
    monkeypatch.setattr(load, "usable_cores", lambda: 6)
    monkeypatch.setattr(load, "_SMALL_MODEL_BYTES", 2**30 if small else 0)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr("trio_llm.model.ops.cpu.set_num_threads", asked.append)
    load_runner(settings(directory, num_kv_blocks=4, **options)).close()
    assert set(asked) == {threads}
    assert f"CPU threads: {threads} (--cpu-threads)" in caplog.messages


@pytest.mark.parametrize(
    ("dtype", "arithmetic", "mode", "expected"),
    [
        ("auto", False, "reference", "float32"),
        ("auto", True, "reference", "bfloat16"),
        ("bfloat16", False, "reference", "bfloat16"),
        ("auto", False, "auto", "bfloat16"),
    ],
)
def test_dtype_auto_is_what_the_processor_computes_faster(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: str,
    arithmetic: bool,
    mode: str,
    expected: str,
) -> None:
    """Without kernels of ours and bfloat16 arithmetic, auto is float32, and the log says why; what is named stays."""
    monkeypatch.setenv("TRIO_LLM_KERNELS", mode)
    monkeypatch.setattr(load, "has_bfloat16_arithmetic", lambda: arithmetic)
    runner = load_runner(settings(directory, num_kv_blocks=4, dtype=dtype))
    assert runner.info.dtype == expected
    assert any("float32 instead of" in message for message in caplog.messages) == (expected == "float32")
    runner.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_the_table_says_what_a_sequence_takes_of_each_group(directory: Path, ahead: bool) -> None:
    """Per group: padding, and the bytes of the longest sequence, in a window those of the chunks in flight."""
    values = {**CONFIG, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    (directory / "config.json").write_text(json.dumps(values))
    chunks = {"long_prefill_token_threshold": 5, "async_scheduling": ahead}
    runner = load_runner(settings(directory, num_kv_blocks=10, block_size=4, **chunks))
    lines = [line for line in runner.budget.render().splitlines() if "group" in line]
    most = [max_live_blocks(256, group, 5 * (1 + ahead)) * runner.info.block_bytes for group in runner.info.kv_groups]
    assert [group.window for group in runner.info.kv_groups] == [None, None, 8]
    assert all(f"at most {count:,} bytes a sequence" in line for line, count in zip(lines, most, strict=True))
    assert most[2] == (6 if ahead else 4) * runner.info.block_bytes


def test_left_out_towers_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Loading a multimodal checkpoint logs which towers were left out, and how many tensors of each."""
    save(make_oracle("gemma4-wrapper"), tmp_path)
    with caplog.at_level("INFO"):
        load_runner(EngineConfig(model=str(tmp_path), num_kv_blocks=4)).close()
    told = [record.getMessage() for record in caplog.records]
    for tower, count in inspect_model(EngineConfig(model=str(tmp_path))).skipped.items():
        assert any(f"left out {count} tensors of {tower}" in message for message in told)
