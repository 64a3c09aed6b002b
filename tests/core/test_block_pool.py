"""The pool against a naive model that keeps everything in plain lists."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trio_llm.core.block_pool import BlockPool

NUM_BLOCKS = 7


class PoolMachine(RuleBasedStateMachine):
    """Two groups take, share, release and register blocks of one pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 2)
        self.owned: list[tuple[int, int]] = []  # (block, group), one entry per reference
        self.idle: list[int] = []  # Free blocks with content, least recently released first.
        self.empty: set[int] = set(range(1, NUM_BLOCKS))
        self.content: dict[int, tuple[int, bytes]] = {}

    @precondition(lambda self: self.idle or self.empty)
    @rule(group=st.integers(0, 1), count=st.integers(1, 3))
    def take(self, group: int, count: int) -> None:
        count = min(count, len(self.idle) + len(self.empty))
        for block in self.pool.take(count, group):
            assert block != 0
            if self.empty:
                assert block in self.empty
                self.empty.remove(block)
            else:
                assert block == self.idle.pop(0), "evicted another than the least recently released"
                del self.content[block]
            self.owned.append((block, group))

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.content)))
        group, key = self.content[block]
        assert self.pool.find(group, key, b"of" + key) == block
        self.pool.share(block)
        if block in self.idle:
            self.idle.remove(block)
        self.owned.append((block, group))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.integers(0, len(self.owned) - 1), min_size=1, max_size=3, unique=True))
        released = [self.owned[at] for at in blocks]
        self.pool.release([block for block, _ in released])
        for block, group in released:
            self.owned.remove((block, group))
            if (block, group) not in self.owned:
                self.idle.append(block) if block in self.content else self.empty.add(block)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), name=st.integers(0, 3))
    def register(self, data: st.DataObject, name: int) -> None:
        block, group = data.draw(st.sampled_from(self.owned))
        key = bytes([name])
        if block in self.content:
            return
        self.pool.register(block, key, b"of" + key)
        if (group, key) not in self.content.values():
            self.content[block] = (group, key)

    @precondition(lambda self: any(block in self.content for block, _ in self.owned))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([block for block, _ in self.owned if block in self.content]))
        self.pool.forget(block)
        del self.content[block]

    @invariant()
    def it_agrees(self) -> None:
        pool = self.pool
        assert pool.num_free == len(self.idle) + len(self.empty)
        assert pool.cached_blocks == len(self.idle)
        assert pool.used_blocks == [len({block for block, of in self.owned if of == group}) for group in (0, 1)]
        order = list(pool.eviction_order())
        assert order[len(self.empty) :] == self.idle
        assert set(order[: len(self.empty)]) == self.empty
        for block in range(1, NUM_BLOCKS):
            assert pool.references(block) == sum(block == owned for owned, _ in self.owned)
            assert (pool.digest(block) is not None) == (block in self.content)
        for group in (0, 1):
            for name in range(4):
                key = bytes([name])
                expected = [block for block, held in self.content.items() if held == (group, key)]
                assert pool.find(group, key, b"of" + key) == (expected[0] if expected else 0)
                assert pool.find(group, key, b"of something else") == 0


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
