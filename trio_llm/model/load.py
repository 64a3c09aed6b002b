"""From settings to a runner: choose the device, check that everything fits, read the weights, allocate the memory."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Protocol

import attrs
import torch

from cpu_kernels.compile import CompileError
from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError
from trio_llm.model.checkpoint.hub import model_name
from trio_llm.model.checkpoint.tensors import FLOATS
from trio_llm.model.device.device import Capture, Cpu, Device, Gpu
from trio_llm.model.loading.cpu_threads import has_bfloat16_arithmetic, usable_cores
from trio_llm.model.loading.draft_model import DraftPlan, inspect_draft
from trio_llm.model.loading.loader import LoadedModel, ModelPlan, inspect_model, load_model
from trio_llm.model.loading.memory_budget import MemoryBudget, available_bytes, make_budget
from trio_llm.model.loading.pool_size import measure_room, size_pool, usable_bytes
from trio_llm.model.ops.dispatch import Dispatch, Mode, dispatching, mode_from_environment
from trio_llm.model.ops.matrices import keeps_integers
from trio_llm.model.parallel.messages import Measured, Start
from trio_llm.model.parallel.ranks import Ranks
from trio_llm.model.runner import Runner
from trio_llm.model_info import ModelInfo, Progress

_log = logging.getLogger(__name__)

# Weights that stay in a core's cache. A request to the 3 MB demo model took 0.3 s on one thread and 2.5 to 3.8 s on two
# while other programs used the machine (2 cores).
_SMALL_MODEL_BYTES = 16 * 2**20
# KV blocks by default: on a CPU, and the minimum of any pool.
_DEFAULT_BLOCKS, _MIN_BLOCKS = 1024, 2
# Device type -> its module of kernels; on any other device the torch reference runs.
_KERNELS = {"cuda": "trio_llm.model.ops.cuda", "cpu": "trio_llm.model.ops.cpu"}
# The default of OMP_NUM_THREADS or torch, before any model of this process changed it.
_TORCH_THREADS = torch.get_num_threads()


def load_runner(
    config: EngineConfig,
    report: Callable[[Progress], None] | None = None,
    *,
    eos_token_id: int | None = None,
    as_stored: bool = True,
) -> Runner:
    """Load a model and make it ready to run steps.

    All settings and files are checked before weights are read.

    Args:
        report: Called with the progress of reading.
        eos_token_id: The tokenizer's end token; answers end there too.
        as_stored: Compute quantised weights as stored where the kernels can; else widen all of them.
    Raises:
        CheckpointError: The model's files are damaged or do not fit together.
        UnsupportedError: A feature that is not supported; names it.
        ConfigError: Settings that do not fit the model or the machine; a TRIO_LLM_KERNELS that is no mode.
        EngineDeadError: A rank failed.
    """
    report = report or (lambda _: None)
    mode, device = mode_from_environment(), open_device(config)
    dispatch = Dispatch(mode, find_kernels(mode, device, report), device.torch_device.type)
    config = config.decided(on_gpu=isinstance(device, Gpu))
    plan = _plan(config, device, dispatch.kernels, as_stored, eos_token_id)
    draft = inspect_draft(config, plan)
    budget = _budget(plan, config, device, draft and draft.plan)
    info = _info(plan, config, budget, device)
    set_threads(config, device, dispatch.kernels, plan.weight_bytes)
    _log_what_changes(plan, draft, lambda model: _why_widened(model, device, dispatch, as_stored))
    with device.working(), dispatching(dispatch), _other_ranks(plan, config, device) as ranks:
        loaded = load_model(plan, device.torch_device, report)
        drafter = draft and draft.load(device.torch_device, report)
        _connect(ranks, report)
        if isinstance(device, Gpu):
            budget = size_pool(budget, config, _rooms(loaded, config, device, dispatch, ranks))
            info = _info(plan, config, budget, device)
        dispatch.take()  # do not count the calls of loading and measuring in a step
        runner = Runner(
            loaded.model, loaded.kv_layout, info, budget,
            max_batch_size=config.max_batch_size, device=device, dispatch=dispatch, draft=drafter, ranks=ranks,
        )  # fmt: skip
        if ranks is not None:
            ranks.start(Start(info.num_kv_blocks, info.max_model_len))
        if not config.enforce_eager:
            _record_together(runner, device, dispatch, report, ranks)
    return runner


class Recorded(Protocol):
    """What has decodes that can be recorded, on rank 0 or another."""

    def capture_decodes(self, capture: Capture, report: Callable[[Progress], None]) -> None: ...

    def record_decodes(self, record: Capture) -> None: ...


def record_decodes(model: Recorded, device: Device, dispatch: Dispatch, report: Callable[[Progress], None]) -> None:
    """Make decodes graphs on a GPU, tapes on native CPU kernels. All ranks do so at the same time."""
    if isinstance(device, Gpu):
        model.capture_decodes(device.capture, report)
    elif isinstance(device, Cpu) and getattr(dispatch.kernels, "NAME", "") == "native":
        model.record_decodes(device.record)


def _record_together(
    runner: Runner, device: Device, dispatch: Dispatch, report: Callable[[Progress], None], ranks: Ranks | None
) -> None:
    """Record decodes when the other ranks do, if there are any, and see that all of them have taken part."""
    if ranks is None:
        record_decodes(runner, device, dispatch, report)
        return
    with ranks.together():
        record_decodes(runner, device, dispatch, _heard(report, ranks))
        device.mark().wait()  # On a GPU, collectives are only queued.
    ranks.check()


def _heard(report: Callable[[Progress], None], ranks: Ranks) -> Callable[[Progress], None]:
    """Return `report`, which also tells that ranks have not been silent."""

    def heard(progress: Progress) -> None:
        ranks.begin_turn()
        report(progress)

    return heard


@contextmanager
def _other_ranks(plan: ModelPlan, config: EngineConfig, device: Device) -> Generator[Ranks | None]:
    """Start the other ranks, which load while the block does; end them if it raises. None if there are none."""
    if plan.group.size == 1:
        yield None
        return
    mark = device.mark if isinstance(device, Gpu) else None
    ranks = Ranks(plan.group, config.distributed_timeout_s, device.torch_device, mark)
    try:
        dtype = str(plan.dtype).removeprefix("torch.")
        kind = device.torch_device.type
        ranks.spawn(attrs.evolve(config, model=str(plan.path), dtype=dtype, device=kind), as_stored=plan.as_stored)
        yield ranks
    except BaseException:
        ranks.kill()
        ranks.close()
        raise


def _connect(ranks: Ranks | None, report: Callable[[Progress], None]) -> None:
    if ranks is not None:
        total = len(ranks.pids)
        ranks.connect(lambda loaded: report(Progress("waiting for ranks", loaded, total, "ranks")))


def _rooms(
    loaded: LoadedModel, config: EngineConfig, device: Gpu, dispatch: Dispatch, ranks: Ranks | None
) -> list[Measured]:
    """Measure steps on this GPU, at the same time as the other ranks on theirs; return what all have measured."""
    if ranks is None:
        return [measure_room(loaded, config, device, dispatch)]
    with ranks.together():
        own = measure_room(loaded, config, device, dispatch)
    return [own, *ranks.measured()]


def _log_what_changes(plan: ModelPlan, draft: DraftPlan | None, why_widened: Callable[[ModelPlan], str]) -> None:
    """Log the tensors that are left out, and what stored formats are computed in, of the model and its draft model."""
    _log_model(plan.path.name, plan, why_widened(plan))
    if draft:
        _log_model(f"draft model {draft.plan.path.name}", draft.plan, why_widened(draft.plan))


def _log_model(name: str, plan: ModelPlan, why_widened: str) -> None:
    for tower, count in plan.skipped.items():
        _log.info("%s: left out %d tensors of %s: only the language model is served", name, count, tower)
    if plan.kept_formats:
        _log.info("%s: computed as stored: %s", name, _megabytes(plan.kept_formats))
    blocks = {name: nbytes for name, nbytes in plan.stored_formats.items() if name not in FLOATS}
    widened = {name: nbytes - plan.kept_formats.get(name, 0) for name, nbytes in blocks.items()}
    if any(widened.values()):
        stored = _megabytes({name: nbytes for name, nbytes in widened.items() if nbytes})
        _log.warning(
            "%s: computed in %s, not as stored, %s: %s; all weights take %.0f MB in memory",
            name, plan.weight_format, why_widened, stored, plan.weight_bytes / 1e6,
        )  # fmt: skip


def _why_widened(plan: ModelPlan, device: Device, dispatch: Dispatch, as_stored: bool) -> str:
    """Return why quantised weights are not computed as stored, or why some of them are not."""
    if plan.engine.quantization:
        return f"with --quantization {plan.engine.quantization}"
    if dispatch.mode == "reference":
        return "with TRIO_LLM_KERNELS=reference"
    if isinstance(device, Gpu):
        return "on a GPU"
    if dispatch.kernels is None:
        return "without native kernels"
    if plan.group.size > 1:
        return f"with --tensor-parallel-size {plan.group.size}"
    return "for lack of a kernel" if as_stored else "to be compared in full precision"


def _megabytes(formats: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({nbytes / 1e6:.0f} MB)" for name, nbytes in formats.items())


def open_device(config: EngineConfig, rank: int = 0) -> Device:
    """Return the device of a rank that the settings name.

    Raises:
        ConfigError: There is none, or there are fewer GPUs than ranks.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return Cpu()
    from trio_llm.model.device.cuda import open_cuda

    return open_cuda(rank, config.tensor_parallel_size)


def find_kernels(mode: Mode, device: Device, report: Callable[[Progress], None]) -> ModuleType | None:
    """Return the kernels for the device, compiled if it is a CPU; None if there are none.

    Raises:
        ConfigError: The mode names kernels of another device, or native ones that cannot be compiled, kept or loaded.
    """
    kind = device.torch_device.type
    of_mode = {"native": "cpu", "cuda": "cuda"}.get(mode, kind)
    if of_mode != kind:
        raise ConfigError("TRIO_LLM_KERNELS", mode, "environment", f"auto or reference on the device {kind}")
    if kind == "cpu" and mode == "reference":
        return None
    kernels = importlib.import_module(_KERNELS[kind])
    try:
        kernels.prepare(lambda done, total: report(Progress("compiling kernels", done, total, "parts")))
    except (CompileError, OSError) as error:
        # An OSError is the cache's: a home that is read-only, a full disk, a file system from which nothing may run.
        reason = f"{error}; $TRIO_LLM_CACHE_DIR says where they are kept" if isinstance(error, OSError) else str(error)
        if mode == "native":
            raise ConfigError("TRIO_LLM_KERNELS", mode, "environment", f"auto or reference: {reason}") from error
        _log.warning("no native kernels, the slower torch reference runs: %s", reason)
        return None
    return kernels


def _budget(plan: ModelPlan, config: EngineConfig, device: Device, draft: ModelPlan | None) -> MemoryBudget:
    """Add up the memory of a rank, with the minimum of blocks on a GPU: its pool is sized after measuring steps."""
    on_host = not isinstance(device, Gpu)
    blocks = config.num_kv_blocks or (_DEFAULT_BLOCKS if on_host else _MIN_BLOCKS)
    return make_budget(plan, config, blocks, rank_bytes(config, device), draft, on_host=on_host)


def rank_bytes(config: EngineConfig, device: Device) -> int:
    """Return the bytes that a rank may allocate on this machine."""
    return usable_bytes(device, config) if isinstance(device, Gpu) else available_bytes() // config.tensor_parallel_size


def _info(plan: ModelPlan, config: EngineConfig, budget: MemoryBudget, device: Device) -> ModelInfo:
    longest = config.max_model_len or plan.max_model_len
    if longest > plan.max_model_len:
        raise ConfigError(
            "max_model_len", longest, "model", f"at most {plan.max_model_len}, what the model was made for"
        )
    return ModelInfo(
        name=model_name(config.model, plan.path),
        architecture=plan.architecture,
        vocab_size=plan.config.text.get_int("vocab_size"),
        hidden_size=plan.config.text.get_int("hidden_size"),
        max_model_len=longest,
        eos_token_ids=plan.eos_token_ids,
        kv_groups=plan.kv_layout.groups,
        num_kv_blocks=budget.num_kv_blocks,
        block_bytes=plan.kv_layout.block_bytes,
        dtype=str(plan.dtype).removeprefix("torch."),
        default_sampling=plan.default_sampling,
        stored_formats=plan.stored_formats,
        kept_formats=plan.kept_formats,
        on_gpu=isinstance(device, Gpu),
        memory_table=budget.render(),
    )


def _end_tokens(plan: ModelPlan, tokenizers: int | None) -> tuple[int, ...]:
    """Return the tokens that end an answer, the tokenizer's first: chat templates write that one."""
    named = dict.fromkeys((*(() if tokenizers is None else (tokenizers,)), *plan.eos_token_ids))
    vocab_size = plan.config.text.get_int("vocab_size")
    if beyond := [token_id for token_id in named if token_id >= vocab_size]:
        _log.warning("end tokens %s are ignored: the model has %d tokens", beyond, vocab_size)
    known = tuple(token_id for token_id in named if token_id < vocab_size)
    if not known:
        _log.warning("the model names no end token: answers run to max_tokens, structured output is refused")
    return known


def _plan(
    config: EngineConfig, device: Device, kernels: ModuleType | None, as_stored: bool, eos_token_id: int | None
) -> ModelPlan:
    """Inspect the model, add the tokenizer's end token, and resolve `dtype: auto` for this processor."""
    plan = inspect_for(config, device, kernels, as_stored=as_stored)
    return attrs.evolve(plan, eos_token_ids=_end_tokens(plan, eos_token_id))


def inspect_for(config: EngineConfig, device: Device, kernels: ModuleType | None, *, as_stored: bool) -> ModelPlan:
    """Inspect the model as it is computed on this device, with these kernels."""
    as_stored = as_stored and kernels is not None and mode_from_environment() != "reference"
    plan = inspect_model(config, as_stored=as_stored, keeps=kernels.keeps if kernels else keeps_integers)
    if config.dtype != "auto" or isinstance(device, Gpu) or kernels is not None or plan.dtype == torch.float32:
        return plan
    if has_bfloat16_arithmetic():
        return plan
    # Measured with torch's kernels restricted to AVX2 or AVX-512: 64 rows take 3 to 6 times as long in 16 bits, one row
    # takes a third of the time up to the same time.
    _log.warning(
        "dtype auto: float32 instead of the checkpoint's %s, which this processor would compute more slowly; "
        "--dtype %s takes half the memory",
        str(plan.dtype).removeprefix("torch."), str(plan.dtype).removeprefix("torch."),
    )  # fmt: skip
    return inspect_model(config, torch.float32)


def num_threads(config: EngineConfig, weight_bytes: int) -> int:
    """Return the threads that compute on a CPU, of all ranks together.

    A small model's operations end before a second thread wakes up, and if another program uses that core, each of them
    waits for it.
    """
    if config.cpu_threads is not None:
        return config.cpu_threads
    if "OMP_NUM_THREADS" in os.environ:
        return _TORCH_THREADS
    return 1 if weight_bytes < _SMALL_MODEL_BYTES else usable_cores()


def set_threads(config: EngineConfig, device: Device, kernels: ModuleType | None, weight_bytes: int) -> None:
    """Set the threads of torch and of the native kernels, for the whole process: a rank's part of all."""
    threads = max(1, num_threads(config, weight_bytes) // config.tensor_parallel_size)
    torch.set_num_threads(threads)
    if isinstance(device, Cpu):
        _log.info("CPU threads: %d (--cpu-threads)", threads)
        if kernels is not None and kernels.NAME == "native":
            kernels.set_num_threads(threads)
