"""Which draft models can work beside a model, what they take, and what happens when one breaks down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model_runner.drive import run
from tests.model_runner.test_load import CONFIG
from trio_llm.config import EngineConfig
from trio_llm.core.speculation import Speculation
from trio_llm.demo import draft_model_path
from trio_llm.errors import ConfigError
from trio_llm.model import load
from trio_llm.model.load import load_runner
from trio_llm.model.loading.draft_model import borrow_groups, inspect_draft
from trio_llm.model.loading.loader import inspect_model
from trio_llm.model_info import KVGroup
from trio_llm.params import SamplingParams

FULL, WIDE = KVGroup((0,), 16), KVGroup((1,), 32)
SEES_8, SEES_20 = KVGroup((2,), 16, 8), KVGroup((3,), 16, 20)


def model(path: Path, name: str, **changes: Any) -> Path:
    """Write a model of random weights, no larger than a config.json."""
    directory = path / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return directory


def settings(model: Path, draft: Path, **options: Any) -> EngineConfig:
    """Return settings of a model with a draft model, neither with weights on disk."""
    defaults = {"load_format": "dummy", "spec_method": "draft_model", "block_size": 4, "dtype": "float32"}
    return EngineConfig(model=str(model), spec_model=str(draft), **{**defaults, **options})


@pytest.mark.parametrize(
    ("owned", "wanted", "chosen"),
    [
        ((FULL,), (FULL,), (0,)),
        ((SEES_8, FULL), (FULL,), (1,)),
        ((FULL, SEES_20, SEES_8), (SEES_8,), (2,)),
        ((FULL, SEES_20), (SEES_8, FULL), (1, 0)),
        ((FULL, SEES_8), (FULL, SEES_8), (0, 1)),
        ((WIDE, FULL), (FULL,), (1,)),
        ((SEES_8,), (FULL,), None),
        ((SEES_8,), (SEES_20,), None),
        ((FULL,), (FULL, FULL), None),
        ((WIDE,), (FULL,), None),
    ],
)
def test_a_draft_model_borrows_tables_that_see_enough(
    owned: tuple[KVGroup, ...], wanted: tuple[KVGroup, ...], chosen: tuple[int, ...] | None
) -> None:
    """Each of its groups gets a table of its own, of its block size, whose window is no shorter, and the tightest."""
    assert borrow_groups(owned, wanted) == chosen


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 130}, "a vocabulary of 130 tokens; it must be the model's vocabulary of 128"),
        ({"max_position_embeddings": 100}, "made for 100 tokens of context; lower --max-model-len from 256"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "all tokens .* and a window of 8"),
    ],
)
def test_a_draft_model_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    """Another vocabulary, a shorter context or layers without a table are one line that says so, before reading."""
    config = settings(model(tmp_path, "model"), model(tmp_path, "draft", **changes))
    with pytest.raises(ConfigError, match=f"model: spec_model = .*{reason}"):
        load_runner(config)


def test_only_the_demo_model_has_a_draft_model_of_its_own(tmp_path: Path) -> None:
    """Beside the demo model nothing need be named; beside another one the setting to name it is."""
    demo = EngineConfig(spec_method="draft_model", max_draft_tokens=2)
    found = inspect_draft(demo, inspect_model(demo))
    assert found is not None
    assert found.plan.path == draft_model_path()
    other = EngineConfig(model=str(model(tmp_path, "other")), load_format="dummy", spec_method="draft_model")
    with pytest.raises(ConfigError, match=r"must name a smaller model with the tokenizer of other \(--spec-model\)"):
        load_runner(other)


@pytest.mark.parametrize("options", [{"spec_method": "ngram"}, {"max_draft_tokens": 0}])
def test_no_draft_model_is_loaded_where_none_is_asked(tmp_path: Path, options: dict[str, Any]) -> None:
    """Other methods, or no drafts at all, take no memory for one."""
    runner = load_runner(settings(model(tmp_path, "model"), tmp_path / "none", **options))
    assert runner._drafter is None
    assert runner.budget.draft_bytes == 0


def test_its_memory_is_in_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has its weights and the KV that it keeps in every block; what does not fit says how many would."""
    config = settings(model(tmp_path, "model"), model(tmp_path, "draft", num_hidden_layers=1), num_kv_blocks=50)
    runner = load_runner(config)
    assert runner._drafter is not None
    kv = runner._drafter._kv.nbytes
    assert kv == 50 * runner.budget.draft_block_bytes == runner._kv.nbytes // 3
    assert runner.budget.draft_bytes == kv + runner.budget.draft_weight_bytes
    plain = load_runner(settings(tmp_path / "model", tmp_path, spec_method="none", num_kv_blocks=50))
    logits = 2 * 6 * 4 * CONFIG["vocab_size"] * (512 - 256)  # a row of them for each draft that a step has room for
    assert runner.budget.workspace_bytes == plain.budget.workspace_bytes + logits
    assert (
        f"{runner.budget.draft_bytes:,} bytes  weights, and {kv // 50:,} bytes in each block" in runner.budget.render()
    )
    room = runner.budget.total_bytes - 10 * (runner.budget.block_bytes + runner.budget.draft_block_bytes)
    monkeypatch.setattr(load, "available_bytes", lambda: room)
    with pytest.raises(ConfigError, match=r"draft model .*; --kv-blocks 40 would"):
        load_runner(config)


def test_a_draft_model_that_breaks_down_is_of_no_use_and_no_harm(tmp_path: Path) -> None:
    """Where its numbers are not finite it guesses nothing; the output is the model's as ever."""
    config = settings(model(tmp_path, "model"), model(tmp_path, "draft"), num_kv_blocks=50, max_batch_size=4)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    requests = [(range(at, at + 9), params) for at in range(4, 7)]
    expected = run(load_runner(settings(tmp_path / "model", tmp_path, spec_method="none", num_kv_blocks=50)), requests)
    runner = load_runner(config)
    assert runner._drafter is not None
    good = run(runner, requests, speculation=Speculation(8, None))
    runner._drafter._draft.model.norm.fill_(torch.nan)  # type: ignore[attr-defined]
    broken = run(runner, requests, speculation=Speculation(8, None))
    assert good.token_ids == broken.token_ids == expected.token_ids
    assert good.num_accepted == good.num_drafted > broken.num_drafted == 0
