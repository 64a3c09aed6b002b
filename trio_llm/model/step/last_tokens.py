"""The token that each row sampled in this step and in the one before, which the next plan may not know.

A step may be planned before the one before it is done. The tokens that it lacks are then on the device and are copied
there; only rows whose parameters depend on their output wait for them on the host.

Letters: S tokens of a step, R rows sampled in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.model.device.device import Mark

_NOTHING = -1


@attrs.frozen(eq=False)
class _OnHost:
    """A sampled token on the host: entry `at` of `sampled` [R], valid once `done` has passed."""

    sampled: Tensor
    at: int
    done: Mark


class LastTokens:
    """What this step and the one before it sampled, and one token per permanent row to look them up in.

    A column is written only for a plan that lacks tokens. A failed step may be run again, also in halves: the same rows
    replace what they sampled before, and of different ones the last counts.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._step: int | None = None
        self._column = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._now: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._before: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._on_host_now: dict[int, _OnHost] = {}
        self._on_host_before: dict[int, _OnHost] = {}

    def begin(self, step: int) -> None:
        """Begin a step. Beginning the same one again changes nothing."""
        if step != self._step:
            # One statement, so that an exception cannot swap the columns without changing the step's number.
            self._step, self._now, self._before, self._on_host_before, self._on_host_now = (
                step, {}, self._now, self._on_host_now, {}
            )  # fmt: skip

    def fill(self, token_ids: Tensor, places: Tensor, rows: Tensor) -> None:
        """Write what `rows` sampled in the step before to `places` of token_ids [S].

        A row that failed sampled no token: it goes on with token 0, and its result is dropped.
        """
        for sampled_rows, sampled in self._before.values():
            self._column.index_copy_(0, sampled_rows, sampled)
        token_ids.index_copy_(0, places, self._column.index_select(0, rows).clamp_min_(0))

    def keep(self, rows: NDArray[np.intp], rows_there: Tensor, sampled: Tensor) -> None:
        """Keep what this step sampled, [R]. The caller does not write to it again.

        Args:
            rows: [R], permanent rows; `rows_there` is the same on the device.
        """
        self._now.pop(rows.tobytes(), None)  # `fill` lets the later one win.
        self._now[rows.tobytes()] = rows_there, sampled

    def keep_for_host(self, rows: Mapping[int, int], sampled: Tensor, done: Mark) -> None:
        """Keep the tokens of some rows for `on_host`.

        Args:
            rows: Permanent row -> its index in `sampled`.
            sampled: [R], on the host once `done` has passed.
        """
        self._on_host_now.update({row: _OnHost(sampled, at, done) for row, at in rows.items()})

    def on_host(self, row: int) -> int:
        """Wait for what a row sampled in the step before; negative if it failed, or its launch raised."""
        found = self._on_host_before.get(row)
        if found is None:
            return _NOTHING
        found.done.wait()
        return int(found.sampled[found.at])
