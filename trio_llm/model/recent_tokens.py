"""What each row sampled in this step and in the one before it: where the next step finds what it was not told.

A step may be planned before the one before it is done. The tokens it lacks then are on the device, and go from there
to where they are needed; only rows whose parameters look back at their output have to wait for them on the host.

Letters: S tokens of a step, R rows sampled in it.
"""

from __future__ import annotations

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.model.device import Mark

_NOTHING = -1


@attrs.frozen(eq=False)
class _OnHost:
    """What a launch sampled: permanent rows [R], their tokens, and when these have arrived."""

    rows: NDArray[np.intp]
    token_ids: Tensor
    done: Mark


class RecentTokens:
    """Two columns of one token per permanent row, which change places when a step with another number begins.

    So the halves of a step that failed may be run again: they overwrite their own column and read the other.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._step: int | None = None
        self._now, self._before = (torch.zeros(num_rows, dtype=torch.int64, device=device) for _ in range(2))
        self._on_host_now: list[_OnHost] = []
        self._on_host_before: list[_OnHost] = []

    def begin(self, step: int) -> None:
        """Turn to a step, or again to the same."""
        if step != self._step:
            self._step = step
            self._now, self._before = self._before, self._now
            self._on_host_before, self._on_host_now = self._on_host_now, []

    def fill(self, token_ids: Tensor, places: Tensor, rows: Tensor) -> None:
        """Write what `rows` sampled in the step before to `places` of token_ids [S].

        A row that failed sampled no token: it goes on with token 0, and the result is for nobody.
        """
        token_ids.index_copy_(0, places, self._before.index_select(0, rows).clamp_min_(0))

    def keep(self, rows: Tensor, sampled: Tensor) -> None:
        """Keep on the device what this step sampled, [R] each."""
        self._now.index_copy_(0, rows, sampled)

    def tell(self, rows: NDArray[np.intp], sampled: Tensor, done: Mark) -> None:
        """Keep a copy, [R] each, that is on the host once `done` has passed."""
        self._on_host_now.append(_OnHost(rows, sampled, done))

    def on_host(self, row: int) -> int:
        """Wait for what a row sampled in the step before; negative if it failed, or its launch raised."""
        for launch in reversed(self._on_host_before):
            (found,) = np.nonzero(launch.rows == row)
            if len(found):
                launch.done.wait()
                return int(launch.token_ids[found[0]])
        return _NOTHING
