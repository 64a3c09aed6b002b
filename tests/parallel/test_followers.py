"""What ranks other than 0 do with commands, without processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from trio_llm.model.ops.dispatch import Dispatch
from trio_llm.model.parallel.messages import Decodes
from trio_llm.model.rank import Follower


def test_a_follower_keeps_nothing_of_the_steps_that_it_has_done() -> None:
    """A graph's calls are counted for metrics, which rank 0 reports: they do not heap up here."""
    follower, dispatch = cast(Any, object.__new__(Follower)), Dispatch()

    def replay(_: torch.Tensor, calls: Dispatch) -> None:
        calls.add((("linear", "native", "", 24),))

    follower._device = SimpleNamespace(torch_device=torch.device("cpu"))
    follower._group = SimpleNamespace(broadcast=torch.Tensor.zero_)
    follower._graphs, follower._dispatch = SimpleNamespace(replay=replay), dispatch
    for _ in range(3):
        follower.obey(Decodes(1, []))
    assert dispatch.take() is None
