"""Whole runs on two ranks, which are threads: chunks, prefixes, preemption, drafts, vectors, scores, grammars."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.families import FAMILIES
from tests.model_runner.conftest import make_prompts
from tests.model_runner.drive import Answer, Outcome, Params, least_blocks, run
from tests.model_runner.test_speculation import LOOKUP, MIXED, MOST, same
from tests.parallel.ranks import ThreadRank
from trio_llm.config import EngineConfig
from trio_llm.core.speculation import Speculation
from trio_llm.demo import demo_model_path
from trio_llm.errors import CheckpointError
from trio_llm.grammar import GrammarCompiler, json_schema
from trio_llm.llm import LLM
from trio_llm.model.load import load_runner
from trio_llm.model.parallel.ranks import Ranks
from trio_llm.model.runner import Runner
from trio_llm.model.step.decode_graphs import DecodeGraphs
from trio_llm.params import PoolingParams, SamplingParams
from trio_llm.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
OPTIONS: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 640, "max_batch_size": 16}
Checkpoints = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _thread_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "_process", lambda _, fd: ThreadRank(fd))


def both(directory: Path, **settings: Any) -> Iterator[Runner]:
    """Yield a runner of one rank, then one of two, each closed before the next."""
    for size in (1, 2):
        options = {**OPTIONS, **settings}
        with closing(load_runner(EngineConfig(model=str(directory), tensor_parallel_size=size, **options))) as runner:
            yield runner


def outcomes(directory: Path, requests: list[tuple[list[int], Params]], chunk: int, **settings: Any) -> list[Outcome]:
    """Serve requests on one rank and on two, in a pool so small that sequences are preempted."""
    speculation = settings.pop("speculation", None)
    return [
        run(
            runner,
            requests,
            chunk=chunk,
            num_blocks=2 * least_blocks(runner, 60, chunk),
            speculation=speculation,
            batch_size=8,
        )
        for runner in both(directory, **settings)
    ]


def ranks_of(answer: Answer) -> list[int | None]:
    """Return how likely each token of the prompt was, 1 for the most likely."""
    return [entry and entry.rank for entry in answer.prompt_logprobs or ()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_the_same_under_preemption(checkpoint: Checkpoints, family: str) -> None:
    """Chunked prompts that share prefixes, preempted and computed again: token for token what one rank says."""
    one, two = outcomes(checkpoint(family), [(prompt, GREEDY) for prompt in make_prompts()], chunk=7)
    assert two.token_ids == one.token_ids
    assert two.num_preempted == one.num_preempted > 0
    assert two.hit_tokens == one.hit_tokens > 0


def test_decodes_are_tapes_of_every_rank(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks replay the same sizes in the same order, more often than they record, and say what eager ones say."""
    monkeypatch.setenv("TRIO_LLM_KERNELS", "native")
    replay, sizes = DecodeGraphs.replay, defaultdict[int, list[int]](list)

    def noted(self: DecodeGraphs, decodes: torch.Tensor, *args: Any) -> torch.Tensor:
        sizes[id(self)].append(decodes.shape[1])
        return replay(self, decodes, *args)

    monkeypatch.setattr(DecodeGraphs, "replay", noted)
    requests: list[tuple[list[int], Params]] = [(prompt, GREEDY) for prompt in make_prompts()]
    eager = outcomes(checkpoint("gemma4-26b"), requests, chunk=7, enforce_eager=True)
    assert not sizes
    with closing(
        load_runner(EngineConfig(model=str(checkpoint("gemma4-26b")), tensor_parallel_size=2, **OPTIONS))
    ) as two:
        outcome = run(two, requests, chunk=7, num_blocks=2 * least_blocks(two, 60, 7), batch_size=8)
    assert outcome.token_ids == eager[0].token_ids == eager[1].token_ids
    of_rank_0, of_rank_1 = sizes.values()
    assert of_rank_0 == of_rank_1
    assert len(of_rank_0) > 2 * len(set(of_rank_0)) > 4


@pytest.mark.parametrize("family", ["llama3-rope-gqa-tied", "qwen2-window", "mixtral", "gemma4-e2b"])
def test_every_kind_of_request_is_told_the_same(checkpoint: Checkpoints, family: str) -> None:
    """Seeds, penalties, bans, log-probabilities of output and prompt, vectors: ranks know nothing of them."""
    requests = [(prompt, params) for prompt, params in zip(make_prompts(), MIXED * 2, strict=False)]
    one, two = outcomes(checkpoint(family), requests, chunk=16)
    assert all(same(ours, theirs) for ours, theirs in zip(two.answers, one.answers, strict=True))
    for ours, theirs in zip(two.answers, one.answers, strict=True):
        assert (ours.vector or ()) == pytest.approx(theirs.vector or (), abs=1e-4)
        assert [e and e.rank for e in ours.prompt_logprobs or ()] == [
            e and e.rank for e in theirs.prompt_logprobs or ()
        ]
    assert any(answer.vector for answer in two.answers)
    assert any(answer.prompt_logprobs for answer in two.answers)


@pytest.mark.parametrize("settings", [{}, {"kv_quantization": True}, {"quantization": "int8"}])
@pytest.mark.parametrize("family", ["qwen3-moe", "gemma4-26b"])
def test_drafts_from_the_prompt_change_nothing(checkpoint: Checkpoints, family: str, settings: dict[str, Any]) -> None:
    """Prompt look-up on two ranks, with INT8 too, gives what two ranks give without drafts."""
    requests: list[tuple[list[int], Params]] = [(prompt * 2, GREEDY) for prompt in make_prompts()[:6]]
    directory = checkpoint(family)
    options = {**OPTIONS, **settings}
    with closing(load_runner(EngineConfig(model=str(directory), tensor_parallel_size=2, **options))) as runner:
        plain = run(runner, requests, chunk=16)
        drafted = run(runner, requests, chunk=16, speculation=LOOKUP)
    assert drafted.token_ids == plain.token_ids
    assert drafted.num_accepted > 0


def test_a_draft_model_is_all_on_rank_0(checkpoint: Checkpoints) -> None:
    """Half of a model is drafted for by the whole of it, which guesses nearly everything."""
    directory = checkpoint("gemma4-e2b")
    drafts = {"spec_method": "draft_model", "spec_model": str(directory), "max_draft_tokens": MOST}
    requests: list[tuple[list[int], Params]] = [(prompt, GREEDY) for prompt in make_prompts()[:8]]
    one, two = outcomes(directory, requests, chunk=7, speculation=Speculation(MOST, None), **drafts)
    assert two.token_ids == one.token_ids
    assert two.num_accepted > two.num_drafted // 2


def test_a_grammar_is_known_to_rank_0_only() -> None:
    """Structured output on two ranks is the JSON that one rank writes."""
    tokenizer = Tokenizer.from_directory(demo_model_path())
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    source = json_schema(schema, param="schema")
    written: list[list[int]] = []
    for runner in both(demo_model_path(), dtype="float32"):
        text = (demo_model_path() / "tokenizer.json").read_text()
        compiler = GrammarCompiler(
            text, vocab_size=runner.info.vocab_size, eos_token_ids=list(runner.info.eos_token_ids)
        )
        params = SamplingParams(temperature=0, max_tokens=60, grammar=compiler.compile(source))
        written += run(runner, [(tokenizer.encode("Say it: "), params)]).token_ids
    assert written[0] == written[1]
    assert json.loads(tokenizer.decode(written[1]))["a"] in ("x", "yy")


def test_a_vector_is_the_mean_over_all_chunks(checkpoint: Checkpoints) -> None:
    """Embeddings come from hidden states, which are whole on rank 0."""
    requests: list[tuple[list[int], Params]] = [(prompt, PoolingParams()) for prompt in make_prompts()[:4]]
    one, two = outcomes(checkpoint("qwen3"), requests, chunk=7)
    for ours, theirs in zip(two.answers, one.answers, strict=True):
        assert ours.vector == pytest.approx(theirs.vector, abs=1e-5)


def test_the_table_shows_the_bytes_of_a_rank(checkpoint: Checkpoints) -> None:
    """Weights and blocks are one rank's, as they are in memory; the last line is for all of them."""
    one, two = [(runner.budget, runner._kv.nbytes, runner.info) for runner in both(checkpoint("llama"))]
    assert two[0].kv_bytes == two[1] == one[1] // 2
    assert one[0].weight_bytes // 2 < two[0].weight_bytes < one[0].weight_bytes * 0.6
    assert "all ranks" not in one[2].memory_table
    assert f"{2 * two[0].total_bytes:,} bytes" in two[2].memory_table.splitlines()[-1]
    assert "available to each of 2 ranks" in two[2].memory_table


def test_a_damaged_part_of_another_rank_is_named(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """NaN in the last token of the head, which only the last rank reads, is the error that one rank gives."""
    directory = tmp_path / "damaged"
    shutil.copytree(checkpoint("llama"), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"][-1, 0] = torch.nan
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: holds NaN"):
        load_runner(EngineConfig(model=str(directory), tensor_parallel_size=2))


def test_llm_takes_the_number_of_ranks() -> None:
    """`LLM(tensor_parallel_size=2)` answers as one rank does, and the engine ends with its block."""
    params = SamplingParams(temperature=0, max_tokens=12)
    answers: list[str] = []
    for size in (1, 2):
        with LLM(tensor_parallel_size=size, dtype="float32", num_kv_blocks=64) as llm:
            answers += [output.outputs[0].text for output in llm.generate(["What is"], params, use_tqdm=False)]
    assert answers[0] == answers[1] != ""
