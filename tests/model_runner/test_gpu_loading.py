"""What loading does on a GPU, tried on a device that only claims to be one."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from tests.model_runner import static_ops
from tests.model_runner.tape import Tapes
from tests.model_runner.test_launch import start
from tests.model_runner.test_load import CONFIG
from tests.model_runner.test_runner import GREEDY
from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError, EngineDeadError
from trio_llm.messages import StepPlan
from trio_llm.model import load
from trio_llm.model.device.device import Cpu, Gpu
from trio_llm.model.load import load_runner
from trio_llm.model.ops import torch_attention as attention_torch
from trio_llm.model.step import decode_graphs
from trio_llm.model_info import Progress

GIB = 2**30
PEAK = 3 * 2**20


@attrs.define(eq=False)
class PretendedGpu(Cpu):
    """A CPU with a GPU's memory, whose steps take PEAK bytes each time they are measured."""

    free: int = 8 * GIB
    total: int = 10 * GIB  # so the tenth that utilization leaves alone is 1 GiB
    tapes: Tapes = attrs.field(factory=Tapes)
    released: int = 0
    lost: bool = False

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return self.tapes.capture(work)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        work()
        return PEAK

    def memory(self) -> tuple[int, int]:
        return self.free, self.total

    def is_lost(self) -> bool:
        return self.lost

    def release(self) -> None:
        self.released += 1


@pytest.fixture(autouse=True)
def _on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run operations of torch, which these tapes record; native kernels have tapes of their own."""
    monkeypatch.setenv("TRIO_LLM_KERNELS", "reference")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    """Return the device that settings name, and make its operations such that graphs can be captured."""
    device = PretendedGpu()
    monkeypatch.setattr(load, "open_device", lambda config: device)
    monkeypatch.setattr(attention_torch, "paged_attention", _attention)
    return device


def _attention(q: torch.Tensor, batch: Any, *args: Any) -> torch.Tensor:
    return (REAL if batch.counts else static_ops.paged_attention)(q, batch, *args)


REAL = attention_torch.paged_attention


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model of random weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def settings(directory: Path, **options: Any) -> EngineConfig:
    """Return settings of few rows, so that few graphs are captured."""
    options = {"max_batch_size": 2, "max_num_batched_tokens": 64, **options}
    return EngineConfig(model=str(directory), load_format="dummy", **options)


def test_the_pool_is_what_steps_leave(directory: Path, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is free, a tenth of all stays free; steps, graphs and logits are taken off; the rest is blocks."""
    monkeypatch.setattr(decode_graphs, "graph_sizes", lambda most: [most])
    gpu.free = GIB + 24 * 2**20
    block_bytes = 3 * 16 * 2 * 2 * 16 * 2
    runner = load_runner(settings(directory, max_batch_size=256, enforce_eager=True))
    assert runner.info.num_kv_blocks == (24 * 2**20 - PEAK) // block_bytes
    runner = load_runner(settings(directory, max_batch_size=256))
    assert runner.info.num_kv_blocks == (24 * 2**20 - 2 * PEAK - 256 * 128 * 4) // block_bytes
    assert runner.budget.workspace_bytes == 2 * PEAK + 256 * 128 * 4
    assert "measured, graphs included" in runner.info.memory_table
    assert runner._kv.nbytes == runner.budget.kv_bytes


def test_more_utilization_is_more_blocks(directory: Path, gpu: PretendedGpu) -> None:
    """One percent of all is so many blocks more."""
    gpu.free = int(0.52 * gpu.total)
    blocks = [
        load_runner(settings(directory, max_batch_size=4096, enforce_eager=True, gpu_memory_utilization=u))
        for u in (0.481, 0.482)
    ]
    one, other = (runner.info.num_kv_blocks for runner in blocks)
    assert other - one == pytest.approx(gpu.total * 0.001 / blocks[0].info.block_bytes, abs=1)


def test_no_more_blocks_than_sequences_can_own(directory: Path, gpu: PretendedGpu) -> None:
    """Two sequences of 256 tokens own 32 blocks of 16 at most; the null block is one more."""
    assert load_runner(settings(directory)).info.num_kv_blocks == 33


def test_an_explicit_number_wins(directory: Path, gpu: PretendedGpu) -> None:
    """--kv-blocks is what is taken, less or more than would be chosen."""
    for num_blocks in (5, 70):
        assert load_runner(settings(directory, num_kv_blocks=num_blocks)).info.num_kv_blocks == num_blocks


def test_what_does_not_fit_says_what_would(directory: Path, gpu: PretendedGpu) -> None:
    """Too many blocks are refused with the number that fits, which then fits; too little memory names the setting."""
    gpu.free = GIB + 8 * 2**20
    with pytest.raises(ConfigError, match=r"--kv-blocks \d+ would") as caught:
        load_runner(settings(directory, num_kv_blocks=800))
    blocks = int(caught.value.allowed.split("--kv-blocks ")[1].split()[0])
    assert load_runner(settings(directory, num_kv_blocks=blocks)).info.num_kv_blocks == blocks
    gpu.free = GIB + 3 * 2**20
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization = 0\.9: .* are left of what"):
        load_runner(settings(directory))


def test_decodes_are_captured_unless_forbidden(directory: Path, gpu: PretendedGpu) -> None:
    """Loading captures a graph per size, the largest first, and tells how far it is; --enforce-eager captures none."""
    told: list[Progress] = []
    runner = load_runner(settings(directory, max_batch_size=3), told.append)
    captured = [(p.done, p.total, p.unit) for p in told if p.stage == "capturing decode graphs"]
    assert captured == [(done, 3, "steps") for done in range(4)]
    runner.step(first_step())
    assert gpu.tapes.num_replays == [0, 0, 1]
    assert runner.info.on_gpu
    gpu.tapes = Tapes()
    runner = load_runner(settings(directory, max_batch_size=3, enforce_eager=True))
    runner.step(first_step())
    assert gpu.tapes.graphs == []


def first_step() -> StepPlan:
    """Return a step of one sequence of one token."""
    admitted = start(0, GREEDY, (7,))["admitted"]
    return StepPlan(1, (), admitted, (0,), (0,), (1,), (7,), (True,), (((0, (1,)),),))


def test_closing_frees_everything(directory: Path, gpu: PretendedGpu) -> None:
    """Of a closed runner nothing lives on, neither weights, pool and tables nor what graphs hold; memory is freed."""
    runner = load_runner(settings(directory))
    collect = runner.launch(first_step())
    tensors = [
        runner._kv.layers[0].k, runner._model.layers[0].attention.qkv.weight, runner._rows.tables.tables[0],
        runner._last_tokens._column, runner._graphs._logits, runner._graphs._inputs,
        *(tensor for graph in gpu.tapes.graphs for tensor in graph.owned[:1]),
    ]  # fmt: skip
    alive = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    gpu.tapes = Tapes()
    released = gpu.released
    runner.close()
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)
    assert gpu.released == released + 1
    assert len(collect().token_ids[0]) == 1


@pytest.mark.parametrize(
    ("raised", "lost", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False, torch.OutOfMemoryError),
        (RuntimeError("CUDA error: invalid configuration argument"), False, RuntimeError),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True, EngineDeadError),
        (RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS"), True, EngineDeadError),
    ],
)
@pytest.mark.parametrize("where", ["launch", "collect"])
def test_faults(
    directory: Path, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch,
    raised: Exception, lost: bool, expected: type[Exception], where: str,
) -> None:  # fmt: skip
    """A fault that the device survives is the step's own; one that it does not is the engine's end, whoever met it."""
    runner = load_runner(settings(directory, enforce_eager=True))

    def fail(*args: Any) -> Any:
        gpu.lost = lost
        raise raised

    if where == "launch":
        monkeypatch.setattr(runner._model, "forward", fail)
        with pytest.raises(expected) as caught:
            runner.launch(first_step())
    else:
        collect = runner.launch(first_step())
        monkeypatch.setattr("trio_llm.model.step.pending_step.PendingStep._token_ids", fail)
        with pytest.raises(expected) as caught:
            collect()
    if lost:
        assert f"The device failed: {type(raised).__name__}: {raised}" in str(caught.value)
        assert caught.value.__cause__ is raised
    else:
        assert caught.value is raised


def test_cuda_is_what_a_gpu_is() -> None:
    """The real device has what the pretended one has (it can be imported, not opened, without CUDA)."""
    from trio_llm.model.device.cuda import Cuda

    names = [name for name in dir(Gpu) if not name.startswith("_")]
    assert all(callable(getattr(Cuda, name)) for name in names if name != "torch_device")


def test_without_a_gpu_nothing_of_cuda_is_imported(directory: Path) -> None:
    """Loading and running a model on a CPU imports neither CuPy nor its kernels nor the module for GPUs."""
    code = (
        "import sys\n"
        "from trio_llm.config import EngineConfig\n"
        "from trio_llm.model.load import load_runner\n"
        "from trio_llm.messages import Admission, StepPlan\n"
        "from trio_llm.params import SamplingParams\n"
        f"runner = load_runner(EngineConfig(model={str(directory)!r}, load_format='dummy', device='cpu'))\n"
        "admitted = (Admission(0, (7,), 1, SamplingParams(seed=1)),)\n"
        "runner.step(StepPlan(1, (), admitted, (0,), (0,), (1,), (7,), (True,), (((0, (1,)),),)))\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('cupy', 'cuda_kernels')"
        " or m == 'trio_llm.model.device.cuda'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
