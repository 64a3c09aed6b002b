"""What a model will take, told before any of it is taken, and what the machine has to give.

Letters: S tokens of a step, H hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import attrs

from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError
from trio_llm.messages import KVGroup
from trio_llm.model.kv_cache import KVLayout
from trio_llm.model.loader import ModelPlan

GIB = 2**30


@attrs.frozen(kw_only=True)
class MemoryBudget:
    """Bytes, by purpose.

    Attributes:
        kv_bytes: The pool, padding included.
        group_bytes: Per KV group, what a block of it really holds; the rest of block_bytes is padding.
        sequence_bytes: Per KV group, the most that one sequence of the longest context ever owns.
        workspace_bytes: Activations and logits of the largest step; on a GPU that and the graphs' memory.
        workspace_note: How that is known.
        available_bytes: What could be had when the budget was made.
        draft_weight_bytes, draft_block_bytes: The draft model's; 0 without one.
    """

    weight_bytes: int
    num_kv_blocks: int
    block_bytes: int
    groups: tuple[KVGroup, ...]
    group_bytes: tuple[int, ...]
    sequence_bytes: tuple[int, ...]
    workspace_bytes: int
    available_bytes: int
    draft_weight_bytes: int = 0
    draft_block_bytes: int = 0
    workspace_note: str = "estimated"

    @property
    def kv_bytes(self) -> int:
        return self.num_kv_blocks * self.block_bytes

    @property
    def draft_bytes(self) -> int:
        return self.draft_weight_bytes + self.num_kv_blocks * self.draft_block_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes + self.draft_bytes

    def render(self) -> str:
        """Return the table that is printed at start."""
        lines = [
            _line("weights", self.weight_bytes, ""),
            _line("KV cache", self.kv_bytes, f"{self.num_kv_blocks} blocks of {self.block_bytes:,} bytes"),
        ]
        columns = zip(self.groups, self.group_bytes, self.sequence_bytes, strict=True)
        for index, (group, used, most) in enumerate(columns):
            sees = "all tokens" if group.window is None else f"a window of {group.window}"
            lines.append(
                f"  group {index}: {len(group.layers)} layers, {sees}, {group.block_size} tokens a block, "
                f"{self.block_bytes - used:,} bytes of it padding, at most {most:,} bytes a sequence"
            )
        if self.draft_bytes:
            kv = f"weights, and {self.draft_block_bytes:,} bytes in each block"
            lines.append(_line("draft", self.draft_bytes, kv))
        lines.append(_line("workspace", self.workspace_bytes, self.workspace_note))
        lines.append(_line("total", self.total_bytes, f"of {self.available_bytes / GIB:.2f} GiB available"))
        return "\n".join(lines)


def _line(what: str, num_bytes: int, note: str) -> str:
    return f"{what:<10} {num_bytes / GIB:>9.3f} GiB {num_bytes:>18,} bytes  {note}".rstrip()


def make_budget(
    plan: ModelPlan, config: EngineConfig, num_kv_blocks: int, available_bytes: int, draft: ModelPlan | None = None
) -> MemoryBudget:
    """Add up what a checked checkpoint, its pool of so many blocks and perhaps its draft model will take.

    Raises:
        ConfigError: It does not fit; says by how much and which setting to change.
    """
    layout = plan.kv_layout
    budget = MemoryBudget(
        weight_bytes=plan.weight_bytes,
        num_kv_blocks=num_kv_blocks,
        block_bytes=layout.block_bytes,
        groups=layout.groups,
        group_bytes=tuple(layout.used_bytes(group) for group in range(len(layout.groups))),
        sequence_bytes=tuple(_most_blocks(group, plan, config) * layout.block_bytes for group in layout.groups),
        workspace_bytes=_workspace_bytes(plan, layout, config),
        available_bytes=available_bytes,
        draft_weight_bytes=draft.weight_bytes if draft else 0,
        draft_block_bytes=draft.kv_layout.block_bytes if draft else 0,
    )
    if budget.total_bytes > available_bytes:
        raise _refusal(budget, config)
    return budget


def _most_blocks(group: KVGroup, plan: ModelPlan, config: EngineConfig) -> int:
    """Return the blocks that the longest sequence owns at the worst moment: in a window, those of its chunks too.

    A window that begins inside a block takes one more.
    """
    longest = config.max_model_len or plan.max_model_len
    if group.window is None:
        return -(-longest // group.block_size)
    seen = group.window - 1 + config.max_tokens_in_flight
    return min(-(-longest // group.block_size), -(-seen // group.block_size) + 1)


def max_sampled_tokens(config: EngineConfig) -> int:
    """Return how many tokens a step may sample: one for each sequence, and one more after each of its drafts."""
    drafts = 0 if config.spec_method == "none" else config.max_draft_tokens
    return min(config.max_batch_size * (1 + drafts), config.max_num_batched_tokens)


def _workspace_bytes(plan: ModelPlan, layout: KVLayout, config: EngineConfig) -> int:
    """Estimate what lives at once in the largest step.

    Per token a residual, a normed copy, q, k, v and their rotated copies, and gate_up with its product; of the
    logits the raw ones, an edited copy and the scores of a draw.
    """
    text = plan.config.text
    hidden = text.get_int("hidden_size")
    heads = max(spec.head_dim * (spec.num_heads + 2 * spec.num_kv_heads) for spec in layout.specs)
    per_token = 3 * hidden + 2 * heads + 3 * text.get_int("intermediate_size", 4 * hidden)
    logits = 3 * max_sampled_tokens(config) * text.get_int("vocab_size") * 4
    return config.max_num_batched_tokens * per_token * plan.dtype.itemsize + logits


def _refusal(budget: MemoryBudget, config: EngineConfig) -> ConfigError:
    fixed = budget.weight_bytes + budget.workspace_bytes + budget.draft_weight_bytes
    draft = f" + draft model {budget.draft_bytes / GIB:.2f}" if budget.draft_bytes else ""
    needs = (
        f"weights {budget.weight_bytes / GIB:.2f} + KV cache {budget.kv_bytes / GIB:.2f} + workspace "
        f"{budget.workspace_bytes / GIB:.2f}{draft} GiB do not fit "
        f"in the {budget.available_bytes / GIB:.2f} GiB available"
    )
    blocks = (budget.available_bytes - fixed) // (budget.block_bytes + budget.draft_block_bytes)
    if blocks >= 2:
        return ConfigError("num_kv_blocks", budget.num_kv_blocks, "memory", f"{needs}; --kv-blocks {blocks} would")
    advice = (
        "choose a smaller --model or --quantization int8" if config.quantization is None else "choose a smaller --model"
    )
    return ConfigError("model", config.model, "memory", f"{needs}; {advice}, or lower --max-num-batched-tokens")


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory this process can still get: the machine's, or what its control groups leave of it.

    Page cache counts as available, since the kernel gives it up. `root` is where /proc and /sys are found.
    """
    found = [_machine_bytes(root), *_control_group_bytes(root)]
    return max(0, min(found))


def _machine_bytes(root: Path) -> int:
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_group_bytes(root: Path) -> Iterator[int]:
    """Yield what each limited control group above this process has left (version 2, then version 1)."""
    for directory in control_groups(root, ""):
        limit = _read(directory / "memory.max")
        if limit.isdecimal():
            yield _left(int(limit), directory / "memory.current", directory / "memory.stat", "inactive_file")
    for directory in control_groups(root, "memory"):
        limit = _read(directory / "memory.limit_in_bytes")
        if limit.isdecimal():
            usage = directory / "memory.usage_in_bytes"
            yield _left(int(limit), usage, directory / "memory.stat", "total_inactive_file")


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the directories of this process's control group and all above it; controller "" is version 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
            # Inside a container the path may be the host's, of which nothing is seen but the mount itself.
            own = mount / path.lstrip("/")
            yield from (own, *(above for above in own.parents if above.is_relative_to(mount)))


def _left(limit: int, usage: Path, stat: Path, cached: str) -> int:
    reclaimable = [line.split()[1] for line in _read(stat).splitlines() if line.split()[0] == cached]
    return limit - int(_read(usage) or 0) + int(reclaimable[0] if reclaimable else 0)


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
