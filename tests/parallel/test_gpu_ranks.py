"""Ranks on GPUs, which are pretended, and threads: graphs with collectives, the pool of all, and a rank that hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from tests.model.families import FAMILIES
from tests.model_runner.conftest import make_prompts
from tests.model_runner.drive import Outcome, Params, least_blocks, run
from tests.model_runner.test_decode_graphs import start, various
from tests.model_runner.test_launch import forgetful, outputs_of, run_ahead
from tests.model_runner.test_speculation import LOOKUP, MIXED, MOST, same
from tests.parallel.gpus import GIB, RankGpu, pretend
from tests.parallel.ranks import ThreadRank
from trio_llm.config import EngineConfig
from trio_llm.core.speculation import Speculation
from trio_llm.errors import ConfigError, EngineDeadError
from trio_llm.messages import StepPlan
from trio_llm.model.device import cuda
from trio_llm.model.load import load_runner
from trio_llm.model.parallel import ranks as ranks_module
from trio_llm.model.parallel.ranks import Ranks
from trio_llm.model.parallel.silence import Silence
from trio_llm.model.runner import Runner
from trio_llm.model.step.decode_graphs import graph_sizes
from trio_llm.params import SamplingParams

Checkpoints = Callable[[str], Path]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
ROWS = 8
LATE_S = 1e9  # on a clock, when all time for an answer has passed


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[RankGpu]:
    """Return the GPUs of two ranks."""
    pair = [RankGpu(), RankGpu()]
    monkeypatch.setattr(Ranks, "_process", lambda _, fd: ThreadRank(fd))
    pretend(monkeypatch, pair)
    return pair


def settings(directory: Path, size: int, **options: Any) -> EngineConfig:
    """Return settings of so many ranks."""
    options = {"block_size": 4, "num_kv_blocks": 640, "max_batch_size": ROWS, **options}
    return EngineConfig(model=str(directory), tensor_parallel_size=size, **options)


@contextmanager
def running(directory: Path, size: int = 2, **options: Any) -> Iterator[Runner]:
    """Load a model, and close it."""
    with closing(load_runner(settings(directory, size, **options))) as runner:
        yield runner


def outcomes(directory: Path, requests: list[tuple[list[int], Params]], **ways: Any) -> list[Outcome]:
    """Serve requests call by call on one rank, then by graphs on two."""
    options = ways.pop("options", {})
    longest = max(len(prompt) + (getattr(params, "max_tokens", None) or 10) for prompt, params in requests)
    found: list[Outcome] = []
    for size in (1, 2):
        with running(directory, size, enforce_eager=size == 1, **options) as runner:
            num_blocks = 2 * least_blocks(runner, longest, ways["chunk"])
            found.append(run(runner, requests, num_blocks=num_blocks, batch_size=ROWS, **ways))
    return found


def replays(gpu: RankGpu) -> int:
    """Return how many steps of the model were replayed."""
    return sum(gpu.tapes.num_replays[: len(graph_sizes(ROWS))])


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_with_collectives_say_what_one_rank_says(
    checkpoint: Checkpoints, gpus: list[RankGpu], family: str
) -> None:
    """Every family, with chunks, shared prefixes and preemption: equal tokens, and as many replays on every rank."""
    one, two = outcomes(checkpoint(family), [(prompt, GREEDY) for prompt in make_prompts()], chunk=7)
    assert two.token_ids == one.token_ids
    assert two.num_preempted == one.num_preempted > 0
    assert two.hit_tokens == one.hit_tokens > 0
    assert gpus[0].tapes.num_replays == gpus[1].tapes.num_replays
    assert replays(gpus[0]) > 10


@pytest.mark.parametrize("family", ["qwen2-window", "gemma4-e2b"])
def test_every_kind_of_request_is_told_the_same(checkpoint: Checkpoints, gpus: list[RankGpu], family: str) -> None:
    """Seeds, penalties, log-probabilities and vectors, of steps that are replayed and of some that cannot be."""
    requests = [(prompt, params) for prompt, params in zip(make_prompts(), MIXED * 2, strict=False)]
    one, two = outcomes(checkpoint(family), requests, chunk=16)
    assert all(same(ours, theirs) for ours, theirs in zip(two.answers, one.answers, strict=True))
    for ours, theirs in zip(two.answers, one.answers, strict=True):
        assert (ours.vector or ()) == pytest.approx(theirs.vector or (), abs=1e-4)
    assert replays(gpus[0]) == replays(gpus[1]) > 5


@pytest.mark.parametrize("family", ["qwen3-moe", "gemma4-26b"])
def test_drafts_are_verified_by_replays_on_all_ranks(checkpoint: Checkpoints, gpus: list[RankGpu], family: str) -> None:
    """Prompt look-up: rows of several tokens, rolled back where a draft is wrong, preempted in between."""
    params = attrs.evolve(GREEDY, max_tokens=40)  # answers for which prompts leave no room
    requests: list[tuple[list[int], Params]] = [(prompt * 2, params) for prompt in make_prompts()[:10]]
    one, two = outcomes(checkpoint(family), requests, chunk=7, speculation=LOOKUP)
    assert two.token_ids == one.token_ids
    assert two.num_accepted == one.num_accepted > 0
    assert two.num_preempted > 0
    assert replays(gpus[0]) == replays(gpus[1]) > 5


def test_a_draft_model_has_graphs_on_rank_0_only(checkpoint: Checkpoints, gpus: list[RankGpu]) -> None:
    """It is captured after the model, without the others, and is measured as they measure."""
    directory = checkpoint("gemma4-e2b")
    drafts = {"spec_method": "draft_model", "spec_model": str(directory), "max_draft_tokens": MOST}
    requests: list[tuple[list[int], Params]] = [(prompt, GREEDY) for prompt in make_prompts()[:6]]
    one, two = outcomes(directory, requests, chunk=7, speculation=Speculation(MOST, None), options=drafts)
    assert two.token_ids == one.token_ids
    assert two.num_accepted > two.num_drafted // 2
    assert len(gpus[0].tapes.graphs) == 2 * len(gpus[1].tapes.graphs) == 2 * len(graph_sizes(ROWS))
    assert gpus[0].tapes.num_replays[: len(graph_sizes(ROWS))] == gpus[1].tapes.num_replays


def test_a_step_is_launched_before_the_replay_before_it_is_collected(
    checkpoint: Checkpoints, gpus: list[RankGpu]
) -> None:
    """Tokens that rank 0's plan does not know reach the other rank in the broadcast."""
    plans: list[StepPlan] = []
    requests = various(make_prompts()[:5])
    with running(checkpoint("qwen3")) as runner:
        expected = run(runner, requests, watch=lambda _, plan: plans.append(plan))
        runner.drop_all()
        results = run_ahead(runner, forgetful(plans))
    assert outputs_of(plans, results, len(requests)) == expected.token_ids
    assert replays(gpus[0]) == replays(gpus[1]) > 10


def test_the_pool_is_what_the_fullest_gpu_has_room_for(checkpoint: Checkpoints, gpus: list[RankGpu]) -> None:
    """All ranks have the blocks that fit on the GPU with the least memory; the table shows the bytes on each."""
    gpus[1].free, few = GIB + 8 * 2**20, {"max_batch_size": 64, "enforce_eager": True}
    with running(checkpoint("llama"), num_kv_blocks=None, **few) as runner:
        num_blocks, block_bytes = runner.info.num_kv_blocks, runner.info.block_bytes
        left = gpus[1].free - GIB - runner.budget.rooms[0].workspace_bytes
        assert num_blocks * block_bytes <= left < (num_blocks + 1) * block_bytes
        assert runner._kv.nbytes == num_blocks * block_bytes
        lines = runner.info.memory_table.splitlines()
    assert lines[-3].endswith("GiB available to rank 0")
    assert lines[-2].startswith("rank 1")
    assert f"{runner.budget.total_bytes:,} bytes" in lines[-2]
    assert f"{2 * runner.budget.total_bytes:,} bytes" in lines[-1]
    with pytest.raises(ConfigError, match=rf"on the GPU of rank 1 .* --kv-blocks {num_blocks} would fit"):
        load_runner(settings(checkpoint("llama"), 2, num_kv_blocks=num_blocks + 1, **few))


def test_a_rank_that_hangs_in_a_step_ends_the_engine(
    checkpoint: Checkpoints, gpus: list[RankGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 waits for its GPU, which has no timeout: the communicator is aborted, and the step has no result."""
    monkeypatch.setattr(ranks_module, "_LOOK_S", 0.01)
    with running(checkpoint("qwen3")) as runner:
        runner.step(start(runner, 2))
        silence, communicator = silence_of(runner), gpus[0].communicator
        assert communicator is not None
        communicator.stuck = True
        collect = runner.launch(start(runner, 2))
        assert not silence.is_too_long()
        silence._clock = lambda: LATE_S
        with pytest.raises(EngineDeadError, match=r"The other ranks do not answer: no answer in 120 s\."):
            collect()
        assert communicator.aborted.is_set()
        with pytest.raises(EngineDeadError, match="do not answer"):
            runner.launch(start(runner, 2))


def test_ranks_with_nothing_to_do_are_not_silent(checkpoint: Checkpoints, gpus: list[RankGpu]) -> None:
    """A turn that is over says nothing, however long ago it was."""
    with running(checkpoint("qwen3"), enforce_eager=True) as runner:
        runner.step(start(runner, 2))
        silence = silence_of(runner)
        silence._clock = lambda: LATE_S
        assert not silence.is_too_long()
        silence.begin()
        assert not silence.is_too_long()
        silence._clock = lambda: 2 * LATE_S
        assert silence.is_too_long()
        silence.end()
        assert not silence.is_too_long()


def silence_of(runner: Runner) -> Silence:
    """Return what notices that ranks hang."""
    assert runner.ranks is not None
    assert runner.ranks._silence is not None
    return runner.ranks._silence


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says how many GPUs there are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="tensor_parallel_size = 4: at most 2, the number of GPUs that CUDA sees"):
        cuda.open_cuda(0, 4)
