from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.model_runner.conftest import Golden, golden
from trio_llm.config import EngineConfig
from trio_llm.model.load import load_runner
from trio_llm.model.runner import Runner

__all__ = ["golden"]


@pytest.fixture(scope="session")
def runner_of(golden: Callable[[str], Golden]) -> Iterator[Callable[..., Runner]]:
    """Return a function from a family's name to a runner of its checkpoint on the GPU; all are closed in the end."""
    runners: dict[Any, Runner] = {}

    def make(name: str, **settings: Any) -> Runner:
        key = (name, *sorted(settings.items()))
        if key not in runners:
            options = {"block_size": 4, "num_kv_blocks": 640, "max_batch_size": 16, "device": "cuda", **settings}
            runners[key] = load_runner(EngineConfig(model=str(golden(name).directory), **options))
        return runners[key]

    yield make
    for runner in runners.values():
        runner.close()
    gc.collect()
