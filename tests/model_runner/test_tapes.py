"""Native kernels under the whole engine: recorded decodes, and the account of what ran."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import attrs
import pytest
import torch

from cpu_kernels import library
from cpu_kernels.tape import Arena, record
from tests.model.families import FAMILIES
from tests.model_runner.conftest import NUM_GENERATED, Golden
from tests.model_runner.drive import least_blocks, poison, run
from tests.model_runner.test_decode_graphs import Requests, start, various, watched
from tests.model_runner.test_launch import forgetful, outputs_of, run_ahead
from tests.model_runner.test_runner import GREEDY, VARIED
from tests.model_runner.test_speculation import DRAFTS, LOOKUP, MOST
from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError
from trio_llm.messages import SamplingParams, StepPlan
from trio_llm.model import load
from trio_llm.model.device.device import Cpu
from trio_llm.model.load import load_runner
from trio_llm.model.ops import cpu as ops_cpu
from trio_llm.model.runner import Runner
from trio_llm.model.step.decode_graphs import DecodeGraphs, Outputs

ROOT = Path(__file__).parents[2]
MAX_ROWS = 64
OPTIONS: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 640, "max_batch_size": 16}


@pytest.fixture
def native(golden: Callable[[str], Golden], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runner]:
    """Return a function from a family's name to a runner whose every operation has to be a native kernel's."""

    def make(name: str, **settings: Any) -> Runner:
        monkeypatch.setenv("TRIO_LLM_KERNELS", "native")
        return load_runner(EngineConfig(model=str(golden(name).directory), **{**OPTIONS, **settings}))

    return make


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of the decodes that come from tapes, as they come."""
    sizes: list[int] = []
    replay = DecodeGraphs.replay

    def noted(self: DecodeGraphs, decodes: torch.Tensor, *args: Any) -> Outputs:
        sizes.append(decodes.shape[1])
        return replay(self, decodes, *args)

    monkeypatch.setattr(DecodeGraphs, "replay", noted)
    return sizes


@pytest.mark.parametrize("name", FAMILIES)
def test_tapes_do_what_single_calls_do(
    golden: Callable[[str], Golden], native: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch,
    replays: list[int], name: str,
) -> None:  # fmt: skip
    """Every family: the oracle's tokens, and the very logits of eager steps, over batches that grow and shrink."""
    expected = golden(name)
    requests = various(expected.prompts)
    eager, exact = watched(native(name, enforce_eager=True), requests, monkeypatch)
    assert replays == []
    outcome, logits = watched(native(name), requests, monkeypatch)
    assert outcome.token_ids == eager.token_ids == expected.follow_all(outcome.token_ids)
    for one, other in zip(logits, exact, strict=True):
        assert torch.equal(one, other)
    assert len(replays) > outcome.num_steps - 5
    assert len(set(replays)) > 3


@pytest.mark.parametrize("name", ["qwen3", "gemma4-26b"])
def test_tapes_choose_greedy_tokens(golden: Callable[[str], Golden], native: Callable[..., Runner], name: str) -> None:
    """The oracle's, with each result read after the next replay, and plans that do not know the tokens."""
    expected = golden(name)
    requests: Requests = [(prompt, GREEDY) for prompt in expected.prompts]
    plans: list[StepPlan] = []
    eager = run(native(name, enforce_eager=True), requests, watch=lambda _, plan: plans.append(plan))
    assert eager.token_ids == expected.follow_all(eager.token_ids)
    runner = native(name)
    assert outputs_of(plans, run_ahead(runner, forgetful(plans)), len(requests)) == eager.token_ids
    assert runner._graphs is not None
    assert all(graph.outputs.likeliest is not None for graph in runner._graphs._graphs.values())


@pytest.mark.parametrize("kv_quantization", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma4-e2b", "mixtral", "qwen3-window"])
def test_drafts_are_judged_on_tapes(
    golden: Callable[[str], Golden], native: Callable[..., Runner], replays: list[int],
    name: str, kv_quantization: bool,
) -> None:  # fmt: skip
    """Rows with drafts, and more tokens than a tape has room for: the very tokens that decodes without drafts give."""
    requests = various(golden(name).prompts[:9])
    plain = run(native(name, kv_quantization=kv_quantization), requests)
    replays.clear()
    sizes: list[int] = []
    drafted = run(
        native(name, kv_quantization=kv_quantization), requests, speculation=LOOKUP,
        watch=lambda _, plan: sizes.append(len(plan.token_ids)) if sum(plan.drafts) else None,
    )  # fmt: skip
    assert drafted.token_ids == plain.token_ids
    assert min(sizes) > 1 and max(sizes) > OPTIONS["max_batch_size"]
    taped = [size for size in sizes if size <= OPTIONS["max_batch_size"]]
    assert len(taped) > 3
    assert not Counter(taped) - Counter(replays)


@pytest.mark.parametrize("name", ["qwen3", "gemma4-26b", "mistral-window"])
def test_a_draft_model_runs_on_tapes(
    golden: Callable[[str], Golden], native: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A model that drafts for itself is right every time, so its tapes read and write what its model's do."""
    requests = [(prompt, GREEDY) for prompt in golden(name).prompts[:3]]
    drafting = {"spec_method": "draft_model", "spec_model": str(golden(name).directory), "max_draft_tokens": MOST}
    plain, runner = run(native(name), requests), native(name, **drafting)
    assert runner._drafter is not None
    eager = Mock(side_effect=runner._drafter._inputs.resend)
    monkeypatch.setattr(runner._drafter._inputs, "resend", eager)
    outcome = run(runner, requests, speculation=DRAFTS)
    assert outcome.token_ids == plain.token_ids
    assert outcome.num_steps < plain.num_steps / 2
    assert eager.call_count == 1  # the prompts'


@pytest.mark.parametrize("name", ["gemma4-e2b", "mixtral", "qwen3-window"])
def test_tapes_read_tables_and_int8_blocks_as_they_are(
    golden: Callable[[str], Golden], native: Callable[..., Runner], replays: list[int], name: str
) -> None:
    """Preempted sequences come back to other blocks; quantised keys and values are written and read alike."""
    requests = various(golden(name).prompts)
    options = {"kv_quantization": True}
    runner = native(name, **options)
    outcome = run(runner, requests, num_blocks=least_blocks(runner, 63, chunk=2048) + 4)
    assert outcome.num_preempted > 0
    assert outcome.token_ids == run(native(name, enforce_eager=True, **options), requests).token_ids
    assert len(replays) > NUM_GENERATED


def test_parameters_work_on_taped_logits(
    golden: Callable[[str], Golden], native: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen requests that want sixteen things get what the reference gives them, steps repeated or not."""
    requests: Requests = list(zip(golden("qwen3").prompts, VARIED * 2, strict=True))
    outcome, repeated = run(native("qwen3"), requests), run(native("qwen3"), requests, repeat_steps=True)
    monkeypatch.setenv("TRIO_LLM_KERNELS", "reference")
    reference = load_runner(EngineConfig(model=str(golden("qwen3").directory), seed=0, **OPTIONS))
    seeded = [
        i for i, (_, params) in enumerate(requests)
        if isinstance(params, SamplingParams) and (params.temperature == 0 or params.seed is not None)
    ]  # fmt: skip
    assert len(seeded) > 8
    expected = run(reference, requests).token_ids
    for other in (outcome, repeated):
        assert [other.token_ids[i] for i in seeded] == [expected[i] for i in seeded]


@pytest.mark.parametrize(("name", "per_token"), [("mixtral", 3 * 2), ("gemma4-26b", 6 * 3)])
def test_experts_are_counted_once(native: Callable[..., Runner], name: str, per_token: int) -> None:
    """Neither recording a tape nor replaying it counts a token twice."""
    runner = native(name)
    poison(runner)
    for step in range(3):
        result = runner.step(start(runner, 3)) if step == 0 else runner.step(after(start(runner, 3), step))
        assert result.expert_tokens is not None
        assert sum(result.expert_tokens) == per_token * 3


def after(plan: StepPlan, step: int) -> StepPlan:
    """Return the same rows' decode at position `step`, of the same tokens."""
    rows = len(plan.request_ids)
    return attrs.evolve(plan, step=step + 1, admitted=(), starts=(step,) * rows, new_blocks=((),) * rows)


def test_a_poisoned_sequence_fails_alone(native: Callable[..., Runner], replays: list[int]) -> None:
    """NaN in one sequence's cache fails that sequence; its batch mates get the tokens that they get without it."""
    clean, hurt = native("llama"), native("llama")
    plan = start(hurt, 3)
    assert clean.step(plan).token_ids == hurt.step(plan).token_ids
    for layer in hurt._kv.layers:
        layer.k[4:8] = torch.nan  # block 1, of the first sequence
    plan = after(plan, 1)
    want, got = clean.step(plan), hurt.step(plan)
    assert 0 in (got.failed or {}) and len(got.failed) == 1
    assert got.token_ids[1:] == want.token_ids[1:]
    assert len(replays) == 4


def test_a_runner_says_what_its_steps_ran_on(native: Callable[..., Runner]) -> None:
    """Each kernel of a step is counted, out of a tape as well."""
    runner = native("llama")
    layers = len(runner._kv.layers)
    plan = start(runner, 2)
    for step in range(3):
        result = runner.step(plan if step == 0 else after(plan, step))
        calls = {(op, where): count for op, where, _, count in result.kernel_calls or ()}
        assert {where for _, where in calls} <= {"native", "torch"}
        assert calls["paged_attention", "native"] == layers


@pytest.mark.parametrize("fails", ["the sampler, after a replay", "a kernel, while a tape is recorded"])
def test_a_launch_that_fails_can_be_repeated(
    native: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """A launch that raises on the way of the tapes leaves nothing half done: repeated, it gives the same tokens."""
    clean, hurt = native("llama"), native("llama")
    plans = [start(clean, 3), *(after(start(clean, 3), step) for step in (1, 2))]
    expected = [clean.step(plan).token_ids for plan in plans]
    if fails.startswith("the sampler"):
        assert hurt.step(plans[0]).token_ids == expected[0]
    with monkeypatch.context() as patch:
        if fails.startswith("the sampler"):
            patch.setattr(hurt._sampler, "sample", Mock(side_effect=RuntimeError("broken")))
        else:
            patch.setattr(ops_cpu, "paged_attention", Mock(side_effect=RuntimeError("broken")))
        plan = plans[1] if fails.startswith("the sampler") else plans[0]
        with pytest.raises(RuntimeError, match="broken"):
            hurt.step(plan)
        assert hurt._dispatch.take() is None
    rest = plans[1:] if fails.startswith("the sampler") else plans
    assert [hurt.step(plan).token_ids for plan in rest] == expected[-len(rest) :]


def test_int8_weights_meet_activations_as_they_are(
    golden: Callable[[str], Golden], native: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8-weights computes what the reference computes of INT8 weights; int8, which rounds activations, does not."""
    requests: Requests = [(prompt, GREEDY) for prompt in golden("qwen3").prompts]
    exact, rounded = (
        watched(native("qwen3", quantization=kind, dtype="float32"), requests, monkeypatch)[1][0]
        for kind in ("int8-weights", "int8")
    )
    monkeypatch.setenv("TRIO_LLM_KERNELS", "reference")
    config = EngineConfig(model=str(golden("qwen3").directory), quantization="int8-weights", dtype="float32", **OPTIONS)
    reference = watched(load_runner(config), requests, monkeypatch)[1][0]
    torch.testing.assert_close(exact, reference, atol=1e-4, rtol=1e-4)
    assert (rounded - reference).abs().max() > 1e-3


def test_closing_frees_tapes(native: Callable[..., Runner]) -> None:
    """Of a closed runner neither weights nor pool nor tapes live on."""
    runner = native("llama")
    runner.step(start(runner, 2))
    attention = runner._model.layers[0].attention  # type: ignore[attr-defined]
    assert runner._graphs is not None
    tensors = [runner._kv.layers[0].k, attention.qkv.weight, runner._graphs._inputs]
    alive = [weakref.ref(tensor) for tensor in tensors]
    del tensors, attention
    runner.close()
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_without_a_compiler_the_reference_runs(
    golden: Callable[[str], Golden], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The default says so once, with the remedy, and gives the right tokens; native refuses at start."""

    def prepare(_: object) -> None:
        raise load.CompileError("no C++ compiler was found: install g++")

    monkeypatch.setattr(ops_cpu, "prepare", prepare)
    monkeypatch.delenv("TRIO_LLM_KERNELS", raising=False)
    config = EngineConfig(model=str(golden("llama").directory), **OPTIONS)
    with caplog.at_level(logging.WARNING):
        runner = load_runner(config)
    assert [r.message for r in caplog.records if "kernels" in r.message] == [
        "no native kernels, the slower torch reference runs: no C++ compiler was found: install g++"
    ]
    prompt = golden("llama").prompts[0]
    (output,) = run(runner, [(prompt, GREEDY)]).token_ids
    assert output == golden("llama").follow(prompt, output)
    monkeypatch.setenv("TRIO_LLM_KERNELS", "native")
    with pytest.raises(ConfigError, match=r"TRIO_LLM_KERNELS = 'native': auto or reference: no C\+\+ compiler"):
        load_runner(config)


@pytest.mark.parametrize("home", [True, False])
def test_without_a_place_for_compiled_kernels_the_reference_runs(
    home: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache that cannot be written, or a user without a home, is named with the remedy; native refuses at start."""
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.delenv("TRIO_LLM_KERNELS", raising=False)
    monkeypatch.delenv("TRIO_LLM_CACHE_DIR", raising=False)
    if home:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    with caplog.at_level(logging.WARNING):
        assert load.find_kernels("auto", Cpu(), Mock()) is None
    (warning,) = caplog.messages
    assert warning.startswith("no native kernels, the slower torch reference runs: ")
    assert warning.endswith("; $TRIO_LLM_CACHE_DIR says where they are kept")
    with pytest.raises(ConfigError, match=r"TRIO_LLM_KERNELS = 'native': auto or reference: .*TRIO_LLM_CACHE_DIR"):
        load.find_kernels("native", Cpu(), Mock())


def test_kernels_of_another_device_are_refused(
    golden: Callable[[str], Golden], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA kernels cannot be asked for on a CPU."""
    monkeypatch.setenv("TRIO_LLM_KERNELS", "cuda")
    with pytest.raises(ConfigError, match="TRIO_LLM_KERNELS = 'cuda': auto or reference on the device cpu"):
        load_runner(EngineConfig(model=str(golden("llama").directory), device="cpu"))


@pytest.mark.parametrize("options", ["", ", quantization='int8'"])
def test_loading_and_recording_import_no_compiler(golden: Callable[[str], Golden], options: str) -> None:
    """INT8 weights and decodes out of a tape need nothing of torch's compiler, whose import takes seconds."""
    code = (
        "import sys\n"
        "from trio_llm.config import EngineConfig\n"
        "from trio_llm.model.load import load_runner\n"
        f"runner = load_runner(EngineConfig(model={str(golden('llama').directory)!r}, device='cpu'{options}))\n"
        "assert runner._graphs.size_for(1, is_mixed=False) == 1\n"
        "print([m for m in ('torch._dynamo', 'torch._inductor', 'sympy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tapes_of_more_and_more_rows_share_their_memory() -> None:
    """Results of 1 to 64 rows together take no more than four times the largest one."""
    arena = Arena()
    for rows in range(1, MAX_ROWS + 1):
        logits, hidden = arena.empty((rows, 1000), torch.float32), arena.empty((rows, 30), torch.float32)
        del logits, hidden
    assert sum(map(len, arena._blocks)) < 4 * MAX_ROWS * 1030 * 4


def test_a_call_of_python_is_on_the_tape() -> None:
    """It runs while it is recorded and at each replay, on the memory of the tape: what a collective needs."""
    x, out, arena = torch.tensor([1.0, 2.0]), torch.zeros(2), Arena()
    seen: list[list[float]] = []

    def add_up(given: torch.Tensor) -> None:
        seen.append(given.tolist())
        given.add_(1)

    def work() -> None:
        doubled = x * 2
        library.call(add_up, doubled)
        out.copy_(doubled)

    tape = record(work, arena)
    assert out.tolist() == [3.0, 5.0]
    x.copy_(torch.tensor([10.0, 20.0]))
    for _ in range(2):
        out.zero_()
        tape()
        assert out.tolist() == [21.0, 41.0]
    assert seen == [[2.0, 4.0], [20.0, 40.0], [20.0, 40.0]]
