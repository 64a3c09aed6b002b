"""The real thing, small: torch and the demo model behind the engine, the bridge and LLM."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from trio_llm import LLM, Config, SamplingParams, open_engine
from trio_llm.config import EngineConfig, ServerConfig
from trio_llm.demo import demo_model_path
from trio_llm.errors import CheckpointError
from trio_llm.model_info import Progress
from trio_llm.params import PoolingParams, Submission

CONFIG = Config(
    engine=EngineConfig(model=str(demo_model_path()), num_kv_blocks=64),
    server=ServerConfig(served_model_name=("demo", "alias")),
)
PROMPT = "The capital of Japan is"
GREEDY = SamplingParams(temperature=0, max_tokens=12)


async def test_an_engine_serves_the_demo_model() -> None:
    """open_engine loads, reports progress, serves text and embeddings under its served name, and says its limits."""
    seen: list[Progress] = []
    async with open_engine(CONFIG, report=seen.append) as engine:
        ids = engine.tokenizer.encode(PROMPT)
        async with engine.open_stream(Submission(ids, GREEDY)) as stream:
            answer = await stream.collect()
        vector, _ = await engine.embed(Submission(ids, PoolingParams()))
        scraped = (await engine.render_metrics()).decode()
    assert engine.tokenizer.decode(answer.token_ids) == answer.text
    assert len(answer.token_ids) == 12
    assert len(vector) == engine.info.hidden_size
    assert engine.info.max_model_len <= 63 * 16
    assert 'model_name="demo"' in scraped
    assert seen


async def test_an_answer_ends_at_the_tokenizers_end_token(tmp_path: Path) -> None:
    """What only tokenizer_config.json names as the end is one, beside those of the model's own files."""
    for file in demo_model_path().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    async with open_engine(Config(engine=EngineConfig(model=str(tmp_path), num_kv_blocks=64))) as engine:
        (end,) = engine.tokenizer.encode("a")
        assert engine.info.eos_token_ids == (end, 2, 0)
        params = SamplingParams(temperature=0, max_tokens=12, logit_bias={end: 100.0})
        async with engine.open_stream(Submission(engine.tokenizer.encode(PROMPT), params)) as stream:
            answer = await stream.collect()
    assert (list(answer.token_ids), answer.finish_reason) == ([end], "stop")


def test_llm_answers_as_the_engine_does() -> None:
    """LLM gives the same tokens in a batch as one by one, and one LLM can follow another in a process."""
    prompts = [PROMPT, "hello", "one two three"]
    with LLM(str(demo_model_path()), num_kv_blocks=64) as llm:
        batch = llm.generate(prompts, GREEDY, use_tqdm=False)
    with LLM(str(demo_model_path()), num_kv_blocks=64, enable_prefix_caching=False, max_num_batched_tokens=7) as llm:
        single = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
    assert [o.outputs[0].token_ids for o in batch] == [o.outputs[0].token_ids for o in single]


async def test_a_cancelled_load_stops_at_its_next_report() -> None:
    """Cancelling while the model loads ends loading soon, not after all of it."""
    reports: list[Progress] = []
    with trio.CancelScope() as scope:
        token = trio.lowlevel.current_trio_token()

        def report(progress: Progress) -> None:
            reports.append(progress)
            if len(reports) == 1:
                trio.from_thread.run_sync(scope.cancel, trio_token=token)
                # The task that waits for the load hears of it in its next turn; until then loading may go on.
                trio.from_thread.run(trio.testing.wait_all_tasks_blocked, trio_token=token)

        async with open_engine(CONFIG, report=report):
            pytest.fail("it was cancelled before it was open")
    assert scope.cancelled_caught
    assert len(reports) == 1


async def test_a_missing_model_is_one_clear_error(tmp_path: Path) -> None:
    """A directory without a model raises CheckpointError out of open_engine, not in a group."""
    with pytest.raises(CheckpointError):
        async with open_engine(Config(engine=EngineConfig(model=str(tmp_path)))):
            pass


async def test_tuning_ends_with_the_engine() -> None:
    """What serving changes of the interpreter is as it was after the engine closed."""
    before, frozen = (gc.get_threshold(), sys.getswitchinterval()), gc.get_freeze_count()
    async with open_engine(CONFIG, tune_interpreter=True):
        assert gc.get_threshold() != before[0]
        assert gc.get_freeze_count() > 0
    assert (gc.get_threshold(), sys.getswitchinterval()) == before
    assert gc.get_freeze_count() <= frozen  # Python 3.12 starts with frozen objects of its own.


def test_guessing_tokens_changes_no_answer() -> None:
    """The demo model answers the same with either method, its own draft model found without being named."""
    prompts = [PROMPT, "Tom has a red kite. Tom has a blue kite. Tom has a"]
    params = [SamplingParams(temperature=at, seed=3, max_tokens=24, ignore_eos=True) for at in range(2)]
    answers: list[list[tuple[int, ...]]] = []
    for method in ("none", "ngram", "draft_model"):
        with LLM(num_kv_blocks=64, dtype="float32", spec_method=method, max_draft_tokens=3) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        answers.append([tuple(output.outputs[0].token_ids) for output in outputs])
    assert answers[0] == answers[1] == answers[2]
