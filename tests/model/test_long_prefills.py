"""Long prefills by torch: what goes where, against float64, and the choice at start by a clock of the test."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import attrs
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.test_attention import CASES, SPEC
from tests.model.test_attention import run as attend_by
from tests.model_runner import rows_in_torch
from tests.model_runner.rows_in_torch import kernel_in_torch, layer_of, long_from, put_kernel_in_torch
from tools.kernel_lab.attention import Case, make
from trio_llm.model.device.device import Cpu
from trio_llm.model.loading import prefill_choice
from trio_llm.model.loading.prefill_choice import choose_prefills, first_faster, seconds_of
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops import long_prefills
from trio_llm.model.ops import seam as ops
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.model.ops.long_prefills import parts_of
from trio_llm.model.paged.kv_cache import plan_kv

IN_TORCH = cast("ModuleType", rows_in_torch)


LONG = 9  # tokens from which these tests take prefills to torch
MIXED = Case(head_dim=64, group=3, sequences=((40, 77), (1, 33), (21, 21), (33, 50), (1, 9), (5, 18)))


@pytest.fixture
def dispatch() -> Iterator[Dispatch]:
    """Run attention as on a GPU, the kernel's part by the reference."""
    with kernel_in_torch(), dispatching(Dispatch(kernels=IN_TORCH, device_type="cpu")) as dispatch, long_from(LONG):
        yield dispatch


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 1, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_ragged_batches_equal_the_textbook(
    case: str, window: int | None, softcap: float | None, dispatch: Dispatch
) -> None:
    """Chunks with a cached prefix, groups of heads, odd lengths, several sequences, slots of NaN: all as they were."""
    torch.manual_seed(0)
    answers, expected = attend_by(attrs.evolve(SPEC, window=window, softcap=softcap), *CASES[case])
    assert (answers - torch.stack(expected)).abs().max() < 2e-5
    assert {implementation for _, implementation, _ in dispatch.calls} <= {"cuda", "torch"}


@pytest.mark.parametrize(
    ("counts", "call"),
    [
        ([9, 30], ("torch", "long prefills")),
        ([9, 1, 8], ("torch", "long prefills, the kernel for other rows")),
        ([1, 8], ("cuda", "")),
    ],
)
def test_a_step_counts_once(counts: list[int], call: tuple[str, str], dispatch: Dispatch) -> None:
    """The implementation and the reason say whether all, some or none of a step's rows were torch's."""
    attend_by(SPEC, [0] * len(counts), counts)
    assert dispatch.calls == {("paged_attention", *call): 1}


@pytest.mark.parametrize(
    ("change", "is_torchs"),
    [
        ({}, True),
        ({"window": 77}, True),
        ({"window": 76}, False),
        ({"softcap": 5.0}, False),
        ({"int8": True}, False),
        ({"int8": True, "fp8": True}, False),
    ],
    ids=str,
)
def test_what_torch_cannot_take_is_the_kernels(change: dict[str, Any], is_torchs: bool) -> None:
    """A window that hides nothing changes nothing; softcaps, smaller windows and caches of 8 bits do."""
    problem = make(replace(MIXED, sequences=((40, 77), (1, 33)), **change))
    batch, kv, spec = layer_of(problem)
    with long_from(20):
        assert [part.is_long for part in parts_of(problem.q, batch, kv, spec)] == (
            [True, False] if is_torchs else [False]
        )


def test_a_context_too_long_to_gather_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory for gathered keys and values is bounded, and what was set aside for it covers it."""
    problem = make(MIXED)
    batch, kv, spec = layer_of(problem)
    shape = long_prefills.Shape.of(problem.q, spec)
    monkeypatch.setattr(long_prefills, "limits", {shape: 20})
    monkeypatch.setattr(long_prefills, "MOST_GATHERED_BYTES", 76 * shape.token_bytes)
    assert [part.is_long for part in parts_of(problem.q, batch, kv, spec)] == [False, False, True, True, False][1:]
    assert shape.token_bytes == 2 * 2 * 64 * 2
    assert [long_prefills.gathered_bytes(n) for n in (10, 1000)] == [10 * shape.token_bytes, 76 * shape.token_bytes]
    monkeypatch.setattr(long_prefills, "limits", {})
    assert long_prefills.gathered_bytes(1000) == 0


def test_a_captured_batch_has_no_prefills() -> None:
    """A graph's rows are of one token each, and the host knows no lengths: whatever the limit, it has one kernel."""
    problem = make(replace(MIXED, sequences=((1, 33), (1, 9))))
    batch, kv, spec = layer_of(problem)
    with long_from(1):
        (part,) = parts_of(problem.q, attrs.evolve(batch, starts=(), counts=()), kv, spec)
    assert not part.is_long and part.tables is batch.tables[0]


def test_modes_keep_their_meaning() -> None:
    """`cuda` accepts torch's attention as it does cuBLAS; `reference` uses neither."""
    problem = make(MIXED)
    batch, kv, spec = layer_of(problem)
    for mode, call in {
        "cuda": ("torch", "long prefills, the kernel for other rows"), "reference": ("reference", "TRIO_LLM_KERNELS"),
    }.items():  # fmt: skip
        with kernel_in_torch(), long_from(20), dispatching(Dispatch(mode, IN_TORCH, "cpu")) as dispatch:  # type: ignore[arg-type]
            ops.paged_attention(problem.q, batch, kv, spec)
        assert dispatch.calls == {("paged_attention", *call): 1}


TIMES = {
    "faster": ([1.0, 1.0, 1.0], [0.5, 0.5, 0.5], 16),
    "faster when long": ([4.0, 2.0, 1.0], [2.0, 1.0, 2.0], 32),
    "faster in the middle": ([4.0, 2.0, 1.0], [4.0, 1.0, 0.5], None),
    "slower": ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], None),
    "equal": ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], None),
    "hardly faster": ([1.0, 1.0, 1.0], [0.95, 0.95, 0.95], None),
    "not a number": ([1.0, 1.0, 1.0], [float("nan"), 0.5, 0.5], None),
}


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[long_prefills.Shape, int]]:
    """Choose between small lengths, with the reference as the kernel."""
    monkeypatch.setattr(prefill_choice, "TOKENS", (64, 32, 16))
    put_kernel_in_torch(monkeypatch)
    yield long_prefills.limits
    long_prefills.limits.clear()


def choose(timer: Callable[[Callable[[], object]], float], **change: Any) -> None:
    """Choose for a model of one layer."""
    spec = attrs.evolve(SPEC, **change)
    layout = plan_kv([spec], block_size=4, dtype=torch.float32)
    choose_prefills(layout, torch.float32, IN_TORCH, Cpu(), 64, timer)


@pytest.mark.parametrize("case", TIMES)
def test_the_clock_decides(case: str, limits: dict[long_prefills.Shape, int]) -> None:
    """From the longest length down, torch gets what it is clearly faster at; a limit of before is forgotten."""
    ours, theirs, expected = TIMES[case]
    script = [seconds for pair in zip(ours, theirs, strict=True) for seconds in pair]
    shape = long_prefills.Shape(torch.device("cpu"), 6, 2, 8, torch.float32)
    limits[shape] = 5
    choose(lambda work: (work(), script.pop(0))[1])
    assert limits == ({} if expected is None else {shape: expected})


def test_only_chunks_that_can_come_are_measured(limits: dict[long_prefills.Shape, int]) -> None:
    """A model whose steps are shorter than a length is not measured there, nor an 8-bit cache or a softcap at all."""
    lengths: list[int] = []

    def never(length: int) -> tuple[float, float]:
        lengths.append(length)
        return 1.0, 0.5

    assert first_faster([16, 64, 32], never) == 16
    assert lengths == [64, 32, 16]
    assert first_faster([], never) is None
    times: list[float] = []
    for layout in (
        plan_kv([SPEC], block_size=4, dtype=torch.int8),
        plan_kv([attrs.evolve(SPEC, softcap=2.0)], block_size=4, dtype=torch.float32),
    ):
        choose_prefills(layout, torch.float32, IN_TORCH, Cpu(), 64, lambda _: times.append(1.0) or 1.0)
    choose_prefills(plan_kv([SPEC], block_size=4, dtype=torch.float32), torch.float32, IN_TORCH, Cpu(), 15)
    assert not times and not limits


def test_windows_are_measured_as_what_they_hide_nothing_of(
    limits: dict[long_prefills.Shape, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer with a window has torch's attention for contexts that fit into it: it is timed without."""
    attended: list[int] = []

    def noted(q: Tensor, *args: Any) -> Tensor:
        attended.append(len(q))
        return REAL(q, *args)

    monkeypatch.setattr(long_prefills, "attend", noted)
    script = [1.0, 0.5] * 3
    choose(lambda _: script.pop(0), window=8)
    assert [*limits.values()] == [16]
    assert attended == [64, 32, 16]


@pytest.mark.parametrize("fault", ["raises", "other mask", "nan", "no kernel", "kernel raises"])
def test_a_fault_leaves_all_to_the_kernel(
    fault: str,
    limits: dict[long_prefills.Shape, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where torch has no such attention, or computes something else, the kernel stays, and the log says why."""

    def broken(q: Tensor, *_: Any) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no kernel image")
        return torch.full_like(q, torch.nan)

    def from_the_first_key(
        q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, context: int, size: int, scale: float
    ) -> Tensor:
        return REAL(q, k, v, blocks[: -(-len(q) // size)], len(q), size, scale)

    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("io_t")

    if fault == "no kernel":
        monkeypatch.setattr(ops_cuda.paged_attn, "supports", lambda *_: "head size 8")
    elif fault == "kernel raises":
        monkeypatch.setattr(ops_cuda.paged_attn, "paged_attention", refuse)
    else:
        monkeypatch.setattr(long_prefills, "attend", from_the_first_key if fault == "other mask" else broken)
    with caplog.at_level(logging.INFO):
        choose(lambda work: (work(), 1.0)[1])
    assert not limits
    said = {
        "raises": "no kernel image", "other mask": "it differs from our kernel", "nan": "it differs from our kernel",
        "no kernel": "head size 8", "kernel raises": "io_t",
    }  # fmt: skip
    assert caplog.messages[-1] == f"heads of 8: torch attends for no prefills: {said[fault]}"


REAL = long_prefills.attend


def test_a_call_is_timed_by_the_device() -> None:
    """The first call does not count, the fastest round does, and the host waits for the end of each."""
    calls, waited = [0], [0]

    @attrs.frozen
    class Mark:
        at_s: float

        def wait(self) -> None:
            waited[0] += 1

        def seconds_since(self, earlier: Mark) -> float:
            return self.at_s - earlier.at_s

    ends = iter([0.0, 4.0, 10.0, 12.0, 20.0, 28.0])
    device = cast("Any", SimpleNamespace(mark=lambda: Mark(next(ends))))

    def work() -> None:
        calls[0] += 1

    assert seconds_of(device, work) == 2.0 / prefill_choice.CALLS
    assert calls[0] == 1 + prefill_choice.ROUNDS * prefill_choice.CALLS
    assert waited[0] == prefill_choice.ROUNDS


class OnGpu(Tensor):
    """A tensor without memory that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def test_on_a_gpu_it_is_flash_attention_by_its_name() -> None:
    """This torch has the operation, with these arguments: causal, keys of fewer heads, and no copy of the result."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").as_subclass(OnGpu)

    called: list[tuple[Any, ...]] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "attention" in str(func):
                called.append((str(func), *(x.shape if isinstance(x, Tensor) else x for x in args), kwargs))
            return func(*args, **(kwargs or {}))

    with Noted():
        cache = empty(16 * 9, 2, 64)
        out = long_prefills.attend(empty(40, 6, 64), cache, cache, empty(5, dtype=torch.int32), 77, 16, 0.3)
    flash, shapes = "aten._scaled_dot_product_flash_attention.default", ((1, 6, 40, 64), (1, 2, 77, 64), (1, 2, 77, 64))
    assert called == [(flash, *shapes, 0.0, True, {"scale": 0.3})]
    assert out.shape == (40, 6, 64) and out.is_contiguous()
