"""INT8 keys and values under the real scheduler and block manager: what is stored, with every block of the pool taken.

Gemma 4 with INT8 KV, a prefix cache and a full pool is where another server corrupted 13 % of its answers
(vllm#50702): windows, two head sizes, scales and evictions meet there.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest
import torch
from torch import Tensor

from tests.model_runner.conftest import NUM_GENERATED, Golden
from tests.model_runner.drive import least_blocks, run
from trio_llm.core.block_manager import BlockManager
from trio_llm.messages import StepPlan
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams

NAMES = ("qwen3", "mistral-window", "mixtral", "gemma4-e2b", "gemma4-26b", "gemma4-31b")
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_GENERATED, ignore_eos=True)
LONGEST = 64


@attrs.define
class Entries:
    """What one request saw of one layer: by position k, v and their scales, as last read; `seen` says which."""

    columns: tuple[Tensor, ...]
    seen: Tensor

    def take(self, positions: Tensor, columns: tuple[Tensor, ...]) -> int:
        """Note what stands at these positions; return the largest change of an int8 value seen before."""
        again = self.seen[positions]
        changed = max(
            largest(c[again], own[positions][again]) for c, own in zip(columns, self.columns[:2], strict=False)
        )
        for own, column in zip(self.columns, columns, strict=True):
            own[positions] = column
        self.seen[positions] = True
        return changed


def largest(one: Tensor, other: Tensor) -> int:
    """Return the largest difference of int8 values."""
    return int((one.int() - other.int()).abs().max()) if len(one) else 0


@attrs.define
class Stored:
    """Reads back, after every step, all that its rows can see in the pool.

    Attributes:
        entries: By (request, layer).
        changed: Of entries that were seen before, the largest change of an int8 value.
        full_steps: Steps after which no block was empty: each was owned, or cached.
        evicted: Blocks that left the prefix cache because somebody needed them.
    """

    runner: Runner
    entries: dict[tuple[int, int], Entries] = attrs.field(factory=dict)
    changed: int = 0
    full_steps: int = 0
    evicted: int = 0
    _digests: dict[int, bytes] = attrs.field(factory=dict)

    def __call__(self, blocks: BlockManager, plan: StepPlan) -> None:
        """Read everything that the step's rows can see, and what became of the pool."""
        for request_id, start, count in zip(plan.request_ids, plan.starts, plan.counts, strict=True):
            self._read(request_id, blocks.tables(request_id), start, start + count)
        states = blocks.blocks()
        self.full_steps += all(state.state != "empty" for state in states)
        digests = {state.block: state.digest for state in states if state.digest is not None}
        self.evicted += sum(digests.get(block) != digest for block, digest in self._digests.items())
        self._digests = digests

    def _read(self, request_id: int, tables: tuple[tuple[int, ...], ...], start: int, end: int) -> None:
        for index, layer in enumerate(self.runner._kv.layers):
            group = self.runner.info.kv_groups[layer.group]
            positions = torch.arange(max(0, start - group.window + 1) if group.window else 0, end)
            slots = torch.tensor(tables[layer.group])[positions // group.block_size] * group.block_size
            slots += positions % group.block_size
            assert layer.k_scale is not None
            assert layer.v_scale is not None
            columns = (layer.k[slots], layer.v[slots], layer.k_scale[slots], layer.v_scale[slots])
            assert all(scale.isfinite().all() for scale in columns[2:]), "a slot is read that was never written"
            if (request_id, index) not in self.entries:
                fresh = tuple(column.new_zeros(LONGEST, *column.shape[1:]) for column in columns)
                self.entries[request_id, index] = Entries(fresh, torch.zeros(LONGEST, dtype=torch.bool))
            self.changed = max(self.changed, self.entries[request_id, index].take(positions, columns))


@pytest.mark.parametrize(("name", "chunk"), [("gemma4-e2b", 1), *[(name, 4) for name in NAMES]])
def test_the_prefix_cache_changes_no_stored_byte(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner], name: str, chunk: int
) -> None:
    """What a request reads of the pool is the same to the bit, scales too, whether it was computed or found there.

    One request runs at a time and hits end where chunks do, so that every token is computed in the same shapes.
    """
    runner = runner_of(name, kv_quantization=True)
    requests = [(prompt, GREEDY) for prompt in golden(name).prompts[:8]]
    seen = [Stored(runner), Stored(runner)]
    outcomes = [
        run(runner, requests, caching=caching, chunk=chunk, batch_size=1, watch=watch)
        for caching, watch in zip((False, True), seen, strict=True)
    ]
    assert outcomes[1].hit_tokens > 0 == outcomes[0].hit_tokens
    without, with_cache = (stored.entries for stored in seen)
    assert with_cache.keys() == without.keys()
    for key, found in with_cache.items():
        assert not (found.seen & ~without[key].seen).any()
        for one, other in zip(found.columns, without[key].columns, strict=True):
            assert torch.equal(one[found.seen], other[found.seen]), key
    assert outcomes[0].token_ids == outcomes[1].token_ids


@pytest.mark.parametrize(("name", "caching"), [("gemma4-e2b", False), *[(name, True) for name in NAMES]])
def test_a_full_pool_corrupts_nothing(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner], name: str, caching: bool
) -> None:
    """With no block to spare, cached ones evicted and sequences thrown out, every byte read is what it has to be.

    All that rows can see is compared, after every step, with what a run without cache and pressure stores; a
    batch of another shape may round a value to the other neighbour, nothing more, and the output is the same.
    """
    runner = runner_of(name, kv_quantization=True)
    requests = [(prompt, GREEDY) for prompt in golden(name).prompts] * 2
    calm, pressed = Stored(runner), Stored(runner)
    expected = run(runner, requests, caching=False, chunk=7, batch_size=4, watch=calm)
    num_blocks = least_blocks(runner, 61, chunk=7) + 8
    outcome = run(runner, requests, caching=caching, chunk=7, num_blocks=num_blocks, watch=pressed)
    assert outcome.num_preempted > 0
    if caching:
        assert pressed.evicted > 20
        assert outcome.hit_tokens > 0
        assert pressed.full_steps > outcome.num_steps // 2
    assert pressed.changed <= 1
    for key, found in pressed.entries.items():
        for one, other in zip(found.columns[:2], calm.entries[key].columns[:2], strict=True):
            assert largest(one[found.seen], other[found.seen]) <= 1, key
    assert outcome.token_ids == expected.token_ids
