"""Pictures of the KV cache: the pool as a grid, the block tables with their text, and what a step changed.

They draw what BlockManager.blocks() and tables() return, and use nothing private.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from trio_llm.core.block_manager import BlockManager, BlockState
from trio_llm.core.sequence import Sequence as CoreSequence
from trio_llm.notebook.svg import PALETTE, Picture, colour, fit, group, legend, rect, text, visible

CELL, GAP, MARGIN = 40, 5, 16
COLUMNS = 16


def draw_pool(blocks: BlockManager | Sequence[BlockState], title: str = "KV block pool") -> Picture:
    """Draw every block: the colour is the request that owns it, the number is how many do.

    A dot marks a block that is in the prefix cache. Dashed blocks are free, but a prompt may still hit them.
    """
    states = blocks.blocks() if isinstance(blocks, BlockManager) else blocks
    return _draw_grid(states, title, _summary(states), changed=None)


def draw_diff(before: Sequence[BlockState], after: Sequence[BlockState], title: str = "What changed") -> Picture:
    """Draw the pool after a step, with rings around the changed blocks and a line for each."""
    changed = {new.block for old, new in zip(before, after, strict=True) if _face(old) != _face(new)}
    lines = [
        f"block {new.block}: {_change(old, new)}"
        for old, new in zip(before, after, strict=True)
        if new.block in changed
    ]
    summary = f"{len(changed)} of {len(after) - 1} blocks changed"
    return _draw_grid(after, title, summary, changed, lines)


def describe(state: BlockState) -> str:
    """Describe a block in words."""
    if state.state == "null":
        return "null block, never written or read"
    if state.state == "empty":
        return "empty"
    if state.state == "cached":
        return "free, still in the prefix cache"
    owners = " and ".join(f"request {request_id}" for request_id, _, _ in state.owners)
    return f"used by {owners}" + (", in the prefix cache" if state.digest else "")


def _change(old: BlockState, new: BlockState) -> str:
    if old.owners == new.owners and new.state == "used":
        return "full, now in the prefix cache too" if new.digest else "no longer in the prefix cache"
    if old.state == new.state == "cached":
        return "free, evicted, and in the prefix cache with other tokens"
    return f"{describe(old)} → {describe(new)}"


def _face(state: BlockState) -> tuple[object, ...]:
    return state.state, state.owners, state.digest


def _summary(states: Sequence[BlockState]) -> str:
    used = [state for state in states if state.state == "used"]
    shared = sum(len(state.owners) > 1 for state in used)
    cached = sum(state.state == "cached" for state in states)
    empty = sum(state.state == "empty" for state in states)
    return f"{len(used)} used ({shared} shared)  ·  {cached} free, still cached  ·  {empty} empty"


def _draw_grid(
    states: Sequence[BlockState], title: str, summary: str, changed: set[int] | None, lines: Sequence[str] = ()
) -> Picture:
    columns = min(COLUMNS, len(states))
    top = 56
    parts = [text(MARGIN, 26, title, "title"), text(MARGIN, 44, summary, "muted", size=11)]
    for at, state in enumerate(states):
        x = MARGIN + at % columns * (CELL + GAP)
        y = top + at // columns * (CELL + GAP)
        faded = changed is not None and state.block not in changed
        cell = _cell(x, y, state)
        if changed and not faded:
            cell += rect(x - 1.5, y - 1.5, CELL + 3, CELL + 3, css="ring", radius=6)
        parts.append(group([cell], f"block {state.block}: {describe(state)}{_rank(state)}", 0.3 if faded else 1.0))
    y = top + -(-len(states) // columns) * (CELL + GAP) + 16
    key, right = legend(MARGIN, y, _pool_legend(states))
    parts.append(key)
    for line in lines:
        y += 18
        parts.append(text(MARGIN, y, line, "muted", size=11))
    longest = max((len(line) * 6.4 for line in [summary, title, *lines]), default=0)
    width = max(2 * MARGIN + columns * (CELL + GAP) - GAP, right, MARGIN * 2 + longest)
    return Picture(f"{title}: {summary}", width, y + 16, "".join(parts))


def _rank(state: BlockState) -> str:
    if state.eviction_rank is None:
        return ""
    return (
        "; handed out next" if state.eviction_rank == 0 else f"; {state.eviction_rank} blocks are handed out before it"
    )


def _cell(x: float, y: float, state: BlockState) -> str:
    number = text(x + 5, y + 12, str(state.block), "muted", size=9)
    if state.state == "null":
        cross = (
            f'<path class="rule" d="M{x + 8} {y + 8}l{CELL - 16} {CELL - 16}m0 -{CELL - 16}l-{CELL - 16} {CELL - 16}"/>'
        )
        return rect(x, y, CELL, CELL, css="soft") + cross
    if state.state == "empty":
        return rect(x, y, CELL, CELL, css="empty") + number
    if state.state == "cached":
        return (
            rect(x, y, CELL, CELL, css="dash")
            + number
            + f'<circle cx="{x + CELL - 7}" cy="{y + CELL - 7}" r="2.5" fill="{PALETTE[2]}"/>'
        )
    owners = list(dict.fromkeys(request_id for request_id, _, _ in state.owners))
    parts = [rect(x, y, CELL, CELL, fill=colour(owners[0]))]
    for at, owner in enumerate(owners[1:], 1):
        left = x + CELL * at / len(owners)
        parts.append(rect(left, y, x + CELL - left, CELL, fill=colour(owner)))
        parts.append(rect(left, y, min(6.0, x + CELL - left), CELL, fill=colour(owner), radius=0))
    parts.append(text(x + 5, y + 12, str(state.block), "on", size=9))
    parts.append(text(x + CELL / 2, y + 27, str(len(state.owners)), "on title", anchor="middle"))
    if state.digest:
        parts.append(f'<circle cx="{x + CELL - 7}" cy="{y + CELL - 7}" r="2.5" fill="#fff"/>')
    return "".join(parts)


def _pool_legend(states: Sequence[BlockState]) -> list[tuple[str, str]]:
    owners = sorted({request_id for state in states for request_id, _, _ in state.owners})
    entries = [(rect(0, 0, 14, 12, fill=colour(owner), radius=3), f"request {owner}") for owner in owners[:8]]
    dot = f'<circle cx="7" cy="6" r="3" fill="{PALETTE[2]}"/>'
    if owners:
        entries.append((text(7, 10, "2", "title", size=11, anchor="middle"), "its number of owners"))
    entries.append((rect(0, 0, 14, 12, css="empty", radius=3), "empty"))
    entries.append((rect(0, 0, 14, 12, css="dash", radius=3), "free, still cached"))
    entries.append((dot, "in the prefix cache"))
    return entries


def draw_tables(
    sequences: Iterable[CoreSequence], blocks: BlockManager, decode: Callable[[Sequence[int]], str] | None = None
) -> Picture:
    """Draw the block table of each sequence: logical block 0, 1, 2 ... to physical block, with the tokens it holds.

    Only the first KV group is drawn. A bar shows how much of a block is computed.
    """
    wide, high, per_row, left = 132, 62, 5, 92
    size = blocks.groups[0].block_size
    subtitle = f"a text is a list of blocks of {size} tokens, which lie anywhere in the pool"
    parts = [text(MARGIN, 26, "Block tables", "title"), text(MARGIN, 44, subtitle, "muted", size=11)]
    y = 58
    for sequence in sequences:
        (table, *_) = blocks.tables(sequence.request_id)
        parts.append(rect(MARGIN, y + 4, 12, 12, fill=colour(sequence.request_id), radius=3))
        parts.append(text(MARGIN + 18, y + 14, f"request {sequence.request_id}", size=11))
        parts.append(text(MARGIN, y + 31, f"{len(sequence.tokens)} tokens", "muted", size=10))
        parts.append(text(MARGIN, y + 45, f"{sequence.computed} computed", "muted", size=10))
        for at, block in enumerate(table):
            x, top = left + MARGIN + at % per_row * (wide + 6), y + at // per_row * (high + 6)
            tokens = sequence.tokens[at * size : (at + 1) * size]
            computed = max(0, min(size, sequence.computed - at * size))
            parts.append(_chip(x, top, wide, high, sequence.request_id, block, tokens, computed, size, decode))
        y += max(1, -(-len(table) // per_row)) * (high + 6) + 10
    return Picture("Block tables", MARGIN * 2 + left + per_row * (wide + 6), y + 6, "".join(parts))


def _chip(
    x: float, y: float, wide: float, high: float, request_id: int, block: int, tokens: Sequence[int], computed: int,
    size: int, decode: Callable[[Sequence[int]], str] | None,
) -> str:  # fmt: skip
    content = visible(decode(tokens)) if decode else " ".join(map(str, tokens))
    parts = [
        rect(x, y, wide, high, css="soft"),
        rect(x, y, wide, 17, fill=colour(request_id)),
        text(x + 6, y + 12.5, f"block {block}", "on", size=11),
        text(x + wide - 6, y + 12.5, f"{len(tokens)}/{size}", "on", size=10, anchor="end"),
    ]
    room = int((wide - 10) / 5.5)
    for line in range(2):
        piece = content[line * room : (line + 1) * room]
        parts.append(text(x + 5, y + 31 + line * 13, piece, "mono", size=9))
    parts.append(rect(x + 5, y + high - 7, wide - 10, 3, css="empty", radius=1.5))
    if computed:
        parts.append(rect(x + 5, y + high - 7, (wide - 10) * computed / size, 3, fill=colour(request_id), radius=1.5))
    return group(parts, f"block {block}: {fit(content, 2000)} ({computed} of {size} slots computed)")
