"""Grammars in the runner: the model prefers what it likes, and writes what the grammar allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tests.model_runner.drive import least_blocks, run
from trio_llm import grammar
from trio_llm.config import EngineConfig
from trio_llm.core.prompt_lookup import LookupSizes
from trio_llm.core.speculation import Speculation
from trio_llm.errors import InvalidRequestError
from trio_llm.model.load import load_runner
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams

EOS = 0
# More than the tokenizer knows, and no multiple of 32: the padding must never be sampled.
VOCAB = 333
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(['{"a": 17, "b": "yy"}'] * 3, trainer)
    return tokenizer


@pytest.fixture(name="compiler", scope="module")
def _compiler(tokenizer: tokenizers.Tokenizer) -> grammar.GrammarCompiler:
    return grammar.GrammarCompiler(tokenizer.to_str(), vocab_size=VOCAB, eos_token_ids=[EOS])


@pytest.fixture(name="directory", scope="module")
def _directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("dummy")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": EOS,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def load(directory: Path, **options: Any) -> Runner:
    """Load the model with random weights, the same ones every time."""
    config = EngineConfig(model=str(directory), load_format="dummy", block_size=4, num_kv_blocks=400, **options)
    return load_runner(config)


@pytest.fixture(name="runner", scope="module")
def _runner(directory: Path) -> Runner:
    return load(directory)


@pytest.fixture(name="drafting", scope="module")
def _drafting(directory: Path) -> Runner:
    return load(directory, spec_method="draft_model", spec_model=str(directory))


def bound(compiler: grammar.GrammarCompiler, source: grammar.GrammarSource, **changes) -> SamplingParams:
    """Return parameters held to a grammar, with room to complete it."""
    return SamplingParams(grammar=compiler.compile(source), max_tokens=60, **changes)


def test_whatever_the_model_likes_it_writes_the_schema(compiler, tokenizer, runner: Runner) -> None:
    """Random weights, hot and cold, beside free rows: the bound rows are JSON of the schema and end there."""
    schema = grammar.json_schema(SCHEMA, param="p", any_whitespace=False)
    requests = [([5, 6, 7 + i], bound(compiler, schema, temperature=i % 3, seed=i)) for i in range(12)]
    free = [([5, 6, 7 + i], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)) for i in range(4)]
    outputs = run(runner, requests + free, batch_size=16).token_ids
    for output in outputs[:12]:
        assert output[-1] == EOS
        value = json.loads(tokenizer.decode(output[:-1]))
        assert set(value) == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", "yy")
    assert outputs[12:] == run(runner, free).token_ids


@pytest.mark.parametrize("ways", [{"chunk": 3}, {"batch_size": 1}, {"repeat_steps": True}, {"caching": False}])
def test_how_it_is_scheduled_does_not_matter(compiler, runner: Runner, ways) -> None:
    """Chunks, batch mates, repeated steps and cache leave a bound output as it is."""
    schema = grammar.json_schema(SCHEMA, param="p")
    requests = [([9, 8, 7, 6, 5 + i], bound(compiler, schema, temperature=0.9, seed=i)) for i in range(6)]
    assert run(runner, requests, **ways).token_ids == run(runner, requests).token_ids


def test_a_preempted_sequence_goes_on_in_its_grammar(compiler, runner: Runner) -> None:
    """After a preemption the matcher is where the output is, not at its start."""
    pattern = grammar.regex("[0-9]{30}", param="p")
    requests = [([9, 8, 7, 6, 5 + i], bound(compiler, pattern, temperature=0.9, seed=i)) for i in range(4)]
    crowded = run(runner, requests, num_blocks=2 * least_blocks(runner, 40, 2048))
    assert crowded.num_preempted > 0
    assert crowded.token_ids == run(runner, requests).token_ids


def test_parameters_that_contradict_each_other_are_refused_alone(compiler, runner: Runner) -> None:
    """Where a request's parameters leave no token, it is refused as invalid; its neighbour is answered."""
    digits = grammar.regex("[0-9]+", param="p")
    fine = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    for contradicted in (
        bound(compiler, digits, allowed_token_ids=(300,)),
        SamplingParams(allowed_token_ids=(EOS,), min_tokens=3, max_tokens=5),
        SamplingParams(allowed_token_ids=(300,), stop_token_ids=(300,), min_tokens=3, max_tokens=5),
    ):
        outcome = run(runner, [([5, 6], contradicted), ([5, 7], fine)])
        assert isinstance(outcome.answers[0].error, InvalidRequestError)
        assert len(outcome.answers[1].token_ids) == 5


def test_drafts_stay_within_the_grammar(compiler, runner: Runner, drafting: Runner) -> None:
    """A draft model drafts what the grammar allows, and its drafts are judged where the ones before them lead."""
    schema = grammar.json_schema(SCHEMA, param="p")
    requests = [([9, 8, 7, 6, 5 + i], bound(compiler, schema, temperature=i % 2, seed=i)) for i in range(6)]
    expected = run(runner, requests)
    drafted = run(drafting, requests, speculation=Speculation(4, None))
    looked_up = run(runner, requests, speculation=Speculation(4, LookupSizes(1, 2)))
    assert drafted.token_ids == looked_up.token_ids == expected.token_ids
    assert drafted.num_accepted > 0.8 * drafted.num_drafted
    assert looked_up.num_drafted > 0
