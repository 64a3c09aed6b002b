"""What a step has in common with the one before it is not laid out again, as long as it is the same."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import torch

from trio_llm.messages import UNKNOWN, StepPlan
from trio_llm.model.device.device import Cpu
from trio_llm.model.paged.kv_cache import KVLayout
from trio_llm.model.step.input_rows import InputRows, PlanRows
from trio_llm.model.step.last_tokens import LastTokens
from trio_llm.model_info import KVGroup

LAYOUT = KVLayout((), (KVGroup((0,), 4),), 1, 0, 0, torch.float32)


def make_rows(*request_ids: int) -> InputRows:
    """Return rows of these requests, in a machine of three."""
    rows = InputRows(3, LAYOUT, 64, Cpu(), LastTokens(3, torch.device("cpu")))
    for request_id in request_ids:
        rows.admit(request_id)
    return rows


def plan(request_ids: tuple[int, ...], starts: tuple[int, ...], **changes: Any) -> StepPlan:
    """Return a step of one token a row."""
    ones = (1,) * len(starts)
    tokens, samples = tuple(range(5, 5 + len(starts))), (True,) * len(starts)
    step = StepPlan(1, (), (), request_ids, starts, ones, tokens, samples, ((),) * len(starts))
    return attrs.evolve(step, **changes)


def same(one: PlanRows, other: PlanRows) -> bool:
    """Compare all that is laid out."""
    columns = [name.name for name in attrs.fields(PlanRows) if name.name not in {"drafts", "additions"}]
    return (
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns)
        and list(map(tuple, one.drafts)) == list(map(tuple, other.drafts))
        and all(map(np.array_equal, one.additions, other.additions))
        and len(one.additions) == len(other.additions)
    )


def test_each_step_is_laid_out_as_if_it_were_the_first() -> None:
    """Steps of the same rows, of others, with other counts, without samples, with drafts, blocks and unknown tokens."""
    rows = make_rows(7, 8, 9)
    both = (7, 8)
    plans = [
        plan(both, (3, 9)),
        plan(both, (4, 10)),
        plan(both, (5, 11), token_ids=(UNKNOWN, 3)),
        plan(both, (6, 12), new_blocks=((), ((3, (17,)),))),
        plan(both, (7, 13), samples=(True, False)),
        plan(both, (8, 14), counts=(1, 3), token_ids=(1, 2, 3, 4)),
        plan((8, 7), (17, 9)),
        plan(both, (10, 18), drafts=(0, 0)),
        plan(both, (10, 18), drafts=(0, 2), counts=(1, 3), token_ids=(1, 2, 3, 4)),
        plan(both, (11, 21), counts=(1, 3), token_ids=(1, 2, 3, 4)),
        plan((7, 8, 9), (12, 24, 3)),
    ]
    for one in plans:
        assert same(rows.of(one), make_rows(7, 8, 9).of(one))


def test_requests_that_come_back_have_their_new_rows() -> None:
    """After a preemption the same requests decode, each in the row that was the other's."""
    rows = make_rows(7, 8, 9)
    assert rows.of(plan((7, 8), (3, 9))).index.tolist() == [0, 1]
    for request_id in (7, 8):
        rows.drop(request_id)
    for request_id in (7, 8):
        rows.admit(request_id)
    assert rows.of(plan((7, 8), (4, 10))).index.tolist() == [rows.row_of(7), rows.row_of(8)] == [1, 0]


def test_what_a_row_sampled_last_is_its_next_token() -> None:
    """Whatever parts the batch is launched in, and then launched again."""
    last, rows = LastTokens(3, torch.device("cpu")), np.arange(2)
    last.begin(1)
    for part, sampled in ((rows, [5, 6]), (rows[:1], [7]), (rows[1:], [8]), (rows, [9, 10])):
        last.keep(part, torch.from_numpy(part), torch.tensor(sampled))
    last.begin(2)
    token_ids = torch.zeros(2, dtype=torch.int64)
    last.fill(token_ids, torch.arange(2), torch.arange(2))
    assert token_ids.tolist() == [9, 10]
