"""How many blocks a sequence needs, given its length and the windows of the model."""

from __future__ import annotations

from collections.abc import Sequence

from trio_llm.model_info import KVGroup

MAX_POSITIONS = 2**31 - 1
"""Positions are int32 on the device, so no sequence is longer, even if a window needs few blocks."""


def blocks_for(num_tokens: int, group: KVGroup) -> int:
    """Return the length of a table with a slot for each of the first `num_tokens` tokens."""
    return -(-num_tokens // group.block_size)


def first_visible_block(group: KVGroup, position: int) -> int:
    """Return the index of the first block that a query at `position`, or any later one, can see."""
    if group.window is None:
        return 0
    return max(0, position - group.window + 1) // group.block_size


def max_live_blocks(num_tokens: int, group: KVGroup, max_step_tokens: int | None) -> int:
    """Return the maximum number of blocks of a group that a sequence of this length owns at any time.

    The first query of a step sees the window - 1 tokens before it, so these and the tokens of the step are live. If
    they begin inside a block, they take one more block.
    """
    blocks = blocks_for(num_tokens, group)
    if group.window is None or max_step_tokens is None:
        return blocks
    return min(blocks, blocks_for(group.window - 1 + max_step_tokens, group) + 1)


def longest_sequence(num_blocks: int, groups: Sequence[KVGroup], max_step_tokens: int | None) -> int:
    """Return the length of the longest sequence that fits into a pool of `num_blocks`."""
    low, high = 0, MAX_POSITIONS
    while low < high:
        middle = (low + high + 1) // 2
        if sum(max_live_blocks(middle, group, max_step_tokens) for group in groups) <= num_blocks:
            low = middle
        else:
            high = middle - 1
    return low
