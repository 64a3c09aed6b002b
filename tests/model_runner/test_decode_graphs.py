"""Decodes out of captured graphs are those that run call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.model.families import FAMILIES
from tests.model_runner import static_ops
from tests.model_runner.conftest import NUM_GENERATED, Golden
from tests.model_runner.drive import Outcome, Params, least_blocks, poison, run
from tests.model_runner.tape import CaptureError, Tapes
from tests.model_runner.test_launch import forgetful, outputs_of, run_ahead
from tests.model_runner.test_runner import GREEDY, VARIED
from tests.model_runner.test_speculation import DRAFTS, LOOKUP, MOST
from trio_llm.config import EngineConfig
from trio_llm.messages import Admission, StepPlan
from trio_llm.model.load import load_runner
from trio_llm.model.ops import torch_attention as attention_torch
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.runner import Runner
from trio_llm.model.step.decode_graphs import graph_sizes
from trio_llm.params import SamplingParams

Requests = list[tuple[list[int], Params]]


@pytest.fixture(autouse=True)
def _on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run operations of torch, which these tapes record; native kernels have tapes of their own."""
    monkeypatch.setenv("TRIO_LLM_KERNELS", "reference")


def capture(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Tapes:
    """Capture a runner's decodes on tapes, with operations that can be captured on a CPU."""
    tapes = Tapes()
    with monkeypatch.context() as patch:
        patch.setattr(attention_torch, "paged_attention", static_ops.paged_attention)
        patch.setattr(ops_torch, "moe", static_ops.moe)
        runner.capture_decodes(tapes.capture)
    return tapes


@pytest.fixture
def captured_of(
    golden: Callable[[str], Golden], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Runner, Tapes]]:
    """Return a function from a family's name to a runner of its own with graphs, and their tapes."""

    def make(name: str, **settings: Any) -> tuple[Runner, Tapes]:
        options = {"block_size": 4, "num_kv_blocks": 640, "max_batch_size": 16, **settings}
        runner = load_runner(EngineConfig(model=str(golden(name).directory), **options))
        return runner, capture(runner, monkeypatch)

    return make


def watched(
    runner: Runner, requests: Requests, monkeypatch: pytest.MonkeyPatch, **ways: Any
) -> tuple[Outcome, list[torch.Tensor]]:
    """Serve requests; return also the logits of every step."""
    logits: list[torch.Tensor] = []
    sample = runner._sampler.sample

    def noted(rows: torch.Tensor, *args: Any) -> Any:
        logits.append(rows.clone())
        return sample(rows, *args)

    with monkeypatch.context() as patch:
        patch.setattr(runner._sampler, "sample", noted)
        return run(runner, requests, **ways), logits


def various(prompts: list[list[int]]) -> Requests:
    """Return requests that end one after another, so that batches shrink through all sizes, padded and not."""
    each = [SamplingParams(temperature=0, max_tokens=NUM_GENERATED + i, ignore_eos=True) for i in range(7)]
    return [(prompt, each[i % 7]) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_decodes_are_those_of_single_calls(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner],
    captured_of: Callable[..., tuple[Runner, Tapes]], monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:  # fmt: skip
    """Every family: equal tokens, logits within 1e-4 and equal expert counts, over batches that grow and shrink."""
    requests = various(golden(name).prompts)
    runner, tapes = captured_of(name)
    expected, exact = watched(runner_of(name), requests, monkeypatch)
    outcome, logits = watched(runner, requests, monkeypatch)
    assert outcome.token_ids == expected.token_ids
    assert outcome.num_steps == expected.num_steps == len(exact)
    for one, other in zip(logits, exact, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert sum(tapes.num_replays) > outcome.num_steps - 5
    assert sum(count > 0 for count in tapes.num_replays) >= 2


def test_sizes() -> None:
    """Graphs are for 1, 2, 4 and multiples of 8 rows, and for as many as a step may have."""
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert graph_sizes(30) == [1, 2, 4, 8, 16, 24, 30]


@pytest.mark.parametrize("name", ["gemma4-e2b", "mixtral"])
def test_graphs_of_int8_keys_and_values(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner],
    captured_of: Callable[..., tuple[Runner, Tapes]], name: str,
) -> None:  # fmt: skip
    """Decodes quantise what they write and read it back as steps without graphs do, windows and experts included."""
    requests = various(golden(name).prompts)
    runner, tapes = captured_of(name, kv_quantization=True)
    assert run(runner, requests).token_ids == run(runner_of(name, kv_quantization=True), requests).token_ids
    assert sum(tapes.num_replays) > NUM_GENERATED


@pytest.mark.parametrize("ways", [{"chunk": 7}, {"repeat_steps": True}, {"caching": False, "batch_size": 5}])
def test_parameters_work_on_replayed_logits(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner],
    captured_of: Callable[..., tuple[Runner, Tapes]], ways: dict[str, Any],
) -> None:  # fmt: skip
    """Sixteen requests that want sixteen things get what they get without graphs; steps may be run again in halves."""
    requests: Requests = list(zip(golden("qwen3").prompts, VARIED * 2, strict=True))
    runner, tapes = captured_of("qwen3")
    outcome, expected = run(runner, requests, **ways), run(runner_of("qwen3"), requests, **ways)
    assert outcome.token_ids == expected.token_ids
    for one, other in zip(outcome.answers, expected.answers, strict=True):
        assert [e.logprob for e in one.logprobs] == pytest.approx([e.logprob for e in other.logprobs], abs=1e-4)
    assert sum(tapes.num_replays) > 5


@pytest.mark.parametrize("name", ["qwen3", "gemma4-26b", "mistral-window"])
def test_drafts_and_a_few_tokens_of_prompts_are_replayed(
    golden: Callable[[str], Golden], captured_of: Callable[..., tuple[Runner, Tapes]], name: str
) -> None:
    """Every step of no more tokens than a graph has is a replay, and the oracle says the same."""
    requests = [(prompt, GREEDY) for prompt in golden(name).prompts]
    runner, tapes = captured_of(name)
    sizes: list[int] = []
    ways = {"chunk": 5, "batch_size": 4, "speculation": LOOKUP}
    outcome = run(runner, requests, **ways, watch=lambda _, plan: sizes.append(len(plan.token_ids)))
    assert outcome.token_ids == golden(name).follow_all(outcome.token_ids)
    assert sum(tapes.num_replays) == sum(size <= 16 for size in sizes) > 10
    assert max(sizes) > 16


def test_a_draft_model_has_graphs_of_its_own(
    golden: Callable[[str], Golden], captured_of: Callable[..., tuple[Runner, Tapes]]
) -> None:
    """Its small steps are replays, too, into the same logits; the oracle says the same."""
    requests = [(prompt, GREEDY) for prompt in golden("qwen3").prompts]
    drafting = {"spec_method": "draft_model", "spec_model": str(golden("qwen3").directory), "max_draft_tokens": MOST}
    runner, tapes = captured_of("qwen3", **drafting)
    outcome = run(runner, requests, speculation=DRAFTS, batch_size=4)
    assert outcome.token_ids == golden("qwen3").follow_all(outcome.token_ids)
    assert len(tapes.graphs) == 2 * len(graph_sizes(16))
    of_draft = len(graph_sizes(16))
    assert sum(tapes.num_replays[of_draft:]) > sum(tapes.num_replays[:of_draft]) > 10


def test_preempted_sequences_come_back_to_their_graphs(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner], captured_of: Callable[..., tuple[Runner, Tapes]]
) -> None:
    """Tables whose rows change hands and blocks that change owners are read as they are at each replay."""
    requests = various(golden("qwen3-window").prompts)
    runner, _ = captured_of("qwen3-window")
    num_blocks = least_blocks(runner, 63, chunk=2048) + 4
    outcome = run(runner, requests, num_blocks=num_blocks)
    assert outcome.num_preempted > 0
    assert outcome.token_ids == run(runner_of("qwen3-window"), requests).token_ids


@pytest.mark.parametrize("name", ["qwen3", "gemma4-e2b"])
def test_logits_are_converted_where_they_stay(captured_of: Callable[..., tuple[Runner, Tapes]], name: str) -> None:
    """The head's bfloat16 rows become float32 in the buffer that all graphs share, without a copy of their own.

    One row: for more, the reference computes in the dtype that the processor is fastest in.
    """
    runner, tapes = captured_of(name, dtype="bfloat16", max_batch_size=1)
    vocab = runner.info.vocab_size
    shapes = [(tuple(made.shape), made.dtype) for graph in tapes.graphs for made in graph.owned]
    assert ((1, vocab), torch.bfloat16) in shapes
    assert not [shape for shape, dtype in shapes if shape[-1:] == (vocab,) and dtype == torch.float32]


def start(runner: Runner, num_rows: int) -> StepPlan:
    """Return the first step of so many sequences of one token, which is a decode like any other."""
    groups = range(len(runner.info.kv_groups))
    blocks = [tuple((0, (1 + i * len(groups) + group,)) for group in groups) for i in range(num_rows)]
    rows = tuple(range(num_rows))
    admitted = tuple(Admission(i, (5 + i,), 1, GREEDY) for i in rows)
    token_ids = tuple(5 + i for i in rows)
    zeros, ones = (0,) * num_rows, (1,) * num_rows
    return StepPlan(1, (), admitted, rows, zeros, ones, token_ids, (True,) * num_rows, tuple(blocks))


@pytest.mark.parametrize(("name", "per_token"), [("mixtral", 3 * 2), ("gemma4-26b", 6 * 3)])
@pytest.mark.parametrize("num_rows", [3, 4])
def test_rows_that_fill_a_batch_up_harm_nobody(
    captured_of: Callable[..., tuple[Runner, Tapes]], runner_of: Callable[..., Runner],
    name: str, per_token: int, num_rows: int,
) -> None:  # fmt: skip
    """Three rows in a graph of four: experts count three, and only the rows' own blocks and block 0 are written."""
    runner, tapes = captured_of(name, max_batch_size=4)
    poison(runner)
    result = runner.step(start(runner, num_rows))
    assert tapes.num_replays == [1, 0, 0]
    assert result.expert_tokens is not None
    assert sum(result.expert_tokens) == per_token * num_rows
    eager = runner_of(name)
    for request_id in list(eager._rows._row_of):
        eager._drop(request_id)
    assert result.token_ids == eager.step(start(eager, num_rows)).token_ids
    for layer in runner._kv.layers:
        tokens = runner.info.kv_groups[layer.group].block_size
        written = {slot // tokens for slot in (~layer.k.flatten(1).isnan().all(1)).nonzero().flatten().tolist()}
        groups = len(runner.info.kv_groups)
        # planes are shared by a layer of each group: other groups' blocks show here too
        assert written <= set(range(num_rows * groups + 1))
        assert {1 + i * groups + layer.group for i in range(num_rows)} <= written
        assert (0 in written) == (num_rows == 3)


def test_a_step_may_be_launched_before_the_replay_before_it_is_collected(
    golden: Callable[[str], Golden], captured_of: Callable[..., tuple[Runner, Tapes]], runner_of: Callable[..., Runner]
) -> None:
    """Tokens that the plan does not know are filled into a graph's input where they were sampled."""
    requests = various(golden("qwen3").prompts[:7])
    plans: list[StepPlan] = []
    eager = runner_of("qwen3")
    expected = run(eager, requests, watch=lambda _, plan: plans.append(plan))
    runner, tapes = captured_of("qwen3")
    results = run_ahead(runner, forgetful(plans))
    assert outputs_of(plans, results, len(requests)) == expected.token_ids
    assert sum(tapes.num_replays) > NUM_GENERATED


def test_what_needs_the_host_is_not_captured(golden: Callable[[str], Golden], caplog: pytest.LogCaptureFixture) -> None:
    """The torch reference decides in Python: its decodes stay without graphs, the log says why, and they are right."""
    runner = load_runner(EngineConfig(model=str(golden("qwen3").directory), block_size=4, num_kv_blocks=640))
    tapes = Tapes()
    runner.capture_decodes(tapes.capture)
    assert tapes.graphs == []
    assert "decodes run without graphs: the torch reference of paged_attention requires a host sync" in caplog.text
    prompts = golden("qwen3").prompts[:2]
    outputs = run(runner, [(prompt, GREEDY) for prompt in prompts]).token_ids
    assert outputs == [golden("qwen3").follow(p, o) for p, o in zip(prompts, outputs, strict=True)]


REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x[0] > 0),
    "index by mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "bincount": lambda x: x.long().bincount(),
    "data of the host": lambda x: x + torch.tensor([1.0, 2.0]),
    "numpy": lambda x: x.numpy(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tapes_refuse_what_cuda_does(name: str) -> None:
    """What looks at values, or brings some in, cannot be captured."""
    x = torch.tensor([1.0, 2.0])
    with pytest.raises(CaptureError), torch.inference_mode():
        Tapes().capture(lambda: REFUSED[name](x) and None)


def test_tapes_make_the_calls_again() -> None:
    """A replay reads its inputs anew, overwrites its outputs, and remembers nothing of the replay before."""
    x, out = torch.tensor([1.0, 2.0]), torch.zeros(2)

    def work() -> None:
        doubled = (x * 2).view(2, 1)
        doubled[0] += 1
        out.copy_(doubled.flatten())

    replay = Tapes().capture(work)
    x.copy_(torch.tensor([10.0, 20.0]))
    for _ in range(2):
        out.zero_()
        replay()
        assert out.tolist() == [21.0, 40.0]
