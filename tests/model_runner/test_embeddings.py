"""Vectors of every decoder family, made while the same model generates: transformers' hidden states, pooled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import trio

from tests.engine.fakes import FakeTokenizer
from tests.model.families import FAMILIES, VOCAB
from tests.model_runner.conftest import NUM_GENERATED, Golden
from tests.model_runner.drive import Params, least_blocks, run
from trio_llm.config import EngineConfig
from trio_llm.engine.supervisor import run_engine
from trio_llm.model.load import load_runner
from trio_llm.model.runner import Runner
from trio_llm.params import PoolingParams, SamplingParams, Submission

GREEDY = SamplingParams(temperature=0, max_tokens=NUM_GENERATED, ignore_eos=True)
KINDS = [
    PoolingParams(normalize=False),
    PoolingParams(),
    PoolingParams(pooling="last", normalize=False),
    PoolingParams(pooling="last", dimensions=8),
]


class Letters(FakeTokenizer):
    """One character per token of the tiny models."""

    alphabet = "".join(map(chr, range(VOCAB)))
    vocab_size = VOCAB


@torch.inference_mode()
def oracle_vector(golden: Golden, prompt: list[int], kind: PoolingParams) -> list[float]:
    """Pool what transformers' decoder gives, before any head."""
    decoder = golden.oracle.model
    decoder = getattr(decoder, "language_model", decoder)
    hidden = decoder(input_ids=torch.tensor([prompt])).last_hidden_state[0]
    vector = (hidden.mean(0) if kind.pooling == "mean" else hidden[-1])[: kind.dimensions]
    return (vector / vector.norm() if kind.normalize else vector).tolist()


@pytest.mark.parametrize(("name", "chunk"), [("qwen3", 1), ("qwen3", 0), *[(name, 7) for name in FAMILIES]])
def test_embeddings_come_while_others_generate(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner], name: str, chunk: int
) -> None:
    """Mean and last vectors are within 1e-4 of the oracle's, and neighbours in the batch generate what they would."""
    expected = golden(name)
    prompts = expected.prompts[:8]
    requests: list[tuple[list[int], Params]] = [(prompt, GREEDY) for prompt in prompts]
    requests += [(prompt, kind) for prompt in prompts[:5] for kind in KINDS]
    outcome = run(runner_of(name), requests, chunk=chunk)
    assert outcome.token_ids[:8] == [
        expected.follow(prompt, output) for prompt, output in zip(prompts, outcome.token_ids[:8], strict=True)
    ]
    for (prompt, kind), answer in zip(requests[8:], outcome.answers[8:], strict=True):
        assert isinstance(kind, PoolingParams)
        assert answer.vector == pytest.approx(oracle_vector(expected, prompt, kind), abs=1e-4)
        assert answer.token_ids == []


@pytest.mark.parametrize("name", ["qwen3", "gemma4-26b"])
def test_a_preempted_embedding_is_computed_again(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner], name: str
) -> None:
    """Thrown out between two chunks by a neighbour that grows, a prompt begins again: each token counts once."""
    expected = golden(name)
    runner = runner_of(name)
    grows = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    begun: list[int] = []
    outcome = run(
        runner,
        [([5], grows), (expected.prompts[0], KINDS[0])],
        chunk=1,
        num_blocks=least_blocks(runner, 51, chunk=1) + 2,
        watch=lambda _, plan: begun.extend(i for i, at in zip(plan.request_ids, plan.starts, strict=True) if at == 0),
    )
    assert begun.count(1) == 1 + outcome.num_preempted > 1
    assert outcome.answers[1].vector == pytest.approx(oracle_vector(expected, expected.prompts[0], KINDS[0]), abs=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "gemma4-e2b"])
async def test_one_engine_embeds_and_generates(golden: Callable[[str], Golden], name: str) -> None:
    """Through the running engine: streams and vectors asked for together are those asked for alone; usage is tokens."""
    expected = golden(name)
    prompts = expected.prompts[:4]
    config = EngineConfig(model=str(expected.directory), block_size=4, num_kv_blocks=400, max_num_batched_tokens=32)
    tokens: dict[int, list[int]] = {}
    vectors: dict[int, tuple[tuple[float, ...], Any]] = {}
    tokenizer: Any = Letters()
    async with run_engine(config, lambda: load_runner(config), tokenizer) as engine, trio.open_nursery() as nursery:

        async def generate(at: int) -> None:
            async with engine.open_stream(Submission(prompts[at], GREEDY)) as stream:
                tokens[at] = [token async for delta in stream for token in delta.token_ids]

        async def embed(at: int) -> None:
            vectors[at] = await engine.embed(Submission(prompts[at], KINDS[at]))

        for at in range(4):
            nursery.start_soon(generate, at)
            nursery.start_soon(embed, at)
    for at, prompt in enumerate(prompts):
        assert tokens[at] == expected.follow(prompt, tokens[at])
        assert len(tokens[at]) == NUM_GENERATED
        vector, usage = vectors[at]
        assert vector == pytest.approx(oracle_vector(expected, prompt, KINDS[at]), abs=1e-4)
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 0)
