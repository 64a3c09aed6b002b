from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from tests.model.golden import Golden, make_golden


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Run tiny tensors on one thread: more make them slower, and other tests are running."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    """Return a function from a family's name to its checkpoint and the oracle's answers, made once a session."""
    return cache(lambda name: make_golden(name, tmp_path_factory.mktemp(name)))
