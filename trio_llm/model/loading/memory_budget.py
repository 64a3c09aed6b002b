"""The memory that a model needs, computed before any is allocated, and the memory that is available.

Letters: S tokens of a step, H hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import attrs

from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError
from trio_llm.model.loading.loader import ModelPlan, inspect_model
from trio_llm.model.paged.kv_cache import KVLayout
from trio_llm.model.parallel.messages import Measured
from trio_llm.model_info import KVGroup

GIB = 2**30
_KEPT_BYTES = 2 * 32 * 2**20  # glibc returns what is freed beyond this: twice the largest chunk that it keeps


@attrs.frozen(kw_only=True)
class MemoryBudget:
    """Bytes, by purpose.

    Attributes:
        weight_note: What the weights are computed in, and which formats the files store.
        kv_bytes: The pool, padding included.
        group_bytes: Per KV group, used bytes of a block; the rest of block_bytes is padding.
        sequence_bytes: Per KV group, the maximum that one sequence of the longest context owns.
        workspace_bytes: Activations and logits of the largest step; on a GPU that and the graphs' memory.
        workspace_note: Whether that is estimated or measured.
        loading_bytes: What reading and packing the weights takes beside them, before the pool is there.
        available_bytes: Available when the budget was made.
        draft_weight_bytes, draft_block_bytes: The draft model's; 0 without one.
        ranks: Number of ranks. All else is of rank 0, which has the draft model; the others take as much without it.
        rooms: On GPUs, what the other ranks measured on theirs, from rank 1 on.
    """

    weight_bytes: int
    num_kv_blocks: int
    block_bytes: int
    groups: tuple[KVGroup, ...]
    group_bytes: tuple[int, ...]
    sequence_bytes: tuple[int, ...]
    workspace_bytes: int
    available_bytes: int
    loading_bytes: int = 0
    draft_weight_bytes: int = 0
    draft_block_bytes: int = 0
    workspace_note: str = "estimated"
    weight_note: str = ""
    ranks: int = 1
    rooms: tuple[Measured, ...] = ()

    @property
    def kv_bytes(self) -> int:
        return self.num_kv_blocks * self.block_bytes

    def blocks_for(self, num_sequences: int) -> int:
        """Return the blocks of a pool that holds this many of the longest sequences, the null block included."""
        return 1 + num_sequences * sum(self.sequence_bytes) // self.block_bytes

    @property
    def draft_bytes(self) -> int:
        return self.draft_weight_bytes + self.num_kv_blocks * self.draft_block_bytes

    @property
    def total_bytes(self) -> int:
        pool_bytes = self.num_kv_blocks * (self.block_bytes + self.draft_block_bytes)
        loaded_bytes = self.weight_bytes + self.draft_weight_bytes
        return loaded_bytes + max(self.loading_bytes, pool_bytes + self.workspace_bytes)

    def render(self) -> str:
        """Return the table for the start of the server."""
        lines = [
            _line("weights", self.weight_bytes, self.weight_note),
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
        if self.loading_bytes:
            lines.append(_line("loading", self.loading_bytes, "estimated, before the KV cache and the workspace"))
        to_each = "" if self.ranks == 1 else " to rank 0" if self.rooms else f" to each of {self.ranks} ranks"
        lines.append(_line("total", self.total_bytes, f"of {self.available_bytes / GIB:.2f} GiB available{to_each}"))
        if self.ranks > 1:
            lines += self._of_other_ranks()
        return "\n".join(lines)

    def _of_other_ranks(self) -> list[str]:
        each = self.total_bytes - self.draft_bytes
        totals = [each] * (self.ranks - 1)
        if self.rooms:
            totals = [each - self.workspace_bytes + room.workspace_bytes for room in self.rooms]
        lines = [
            _line(
                f"rank {rank}",
                total,
                f"on a GPU with {(room.usable_bytes + self.weight_bytes) / GIB:.2f} GiB available",
            )
            for rank, (total, room) in enumerate(zip(totals, self.rooms, strict=False), 1)
        ]
        return [*lines, _line("all ranks", self.total_bytes + sum(totals), "")]


def _line(what: str, num_bytes: int, note: str) -> str:
    return f"{what:<10} {num_bytes / GIB:>9.3f} GiB {num_bytes:>18,} bytes  {note}".rstrip()


def _weight_note(plan: ModelPlan) -> str:
    stored = ", ".join(f"{nbytes:,} bytes of {name}" for name, nbytes in plan.stored_formats.items())
    computed = " and ".join((*plan.kept_formats, plan.weight_format))
    return f"{computed}; the files have {stored or 'none'}"


def make_budget(
    plan: ModelPlan,
    config: EngineConfig,
    num_kv_blocks: int,
    available_bytes: int,
    draft: ModelPlan | None = None,
    *,
    on_host: bool = True,
) -> MemoryBudget:
    """Add up the memory of a checked checkpoint, a pool of `num_kv_blocks` blocks and a draft model, if there is one.

    Args:
        on_host: Weights are read and packed in this memory; a GPU's gets them when they are done.
    Raises:
        ConfigError: It does not fit; says by how much and which setting to change.
    """
    budget = add_up(plan, config, num_kv_blocks, available_bytes, draft, on_host=on_host)
    if budget.total_bytes > available_bytes:
        raise _refusal(budget, plan, config)
    return budget


def add_up(
    plan: ModelPlan,
    config: EngineConfig,
    num_kv_blocks: int,
    available_bytes: int,
    draft: ModelPlan | None,
    *,
    on_host: bool,
) -> MemoryBudget:
    """Return the memory of `make_budget`, whether it is available or not."""
    layout = plan.kv_layout
    return MemoryBudget(
        weight_bytes=plan.weight_bytes,
        num_kv_blocks=num_kv_blocks,
        block_bytes=layout.block_bytes,
        groups=layout.groups,
        group_bytes=tuple(layout.used_bytes(group) for group in range(len(layout.groups))),
        sequence_bytes=tuple(_max_blocks(group, plan, config) * layout.block_bytes for group in layout.groups),
        workspace_bytes=_workspace_bytes(plan, layout, config),
        available_bytes=available_bytes,
        loading_bytes=_loading_bytes(plan, draft) if on_host else 0,
        draft_weight_bytes=draft.weight_bytes if draft else 0,
        draft_block_bytes=draft.kv_layout.block_bytes if draft else 0,
        weight_note=_weight_note(plan),
        ranks=plan.group.size,
    )


def _loading_bytes(plan: ModelPlan, draft: ModelPlan | None) -> int:
    return max(plan.loading_bytes, draft.loading_bytes if draft else 0)


def _max_blocks(group: KVGroup, plan: ModelPlan, config: EngineConfig) -> int:
    """Return the maximum of blocks that the longest sequence owns: with a window, those of its chunks too.

    A window that begins inside a block needs one more.
    """
    longest = config.max_model_len or plan.max_model_len
    if group.window is None:
        return -(-longest // group.block_size)
    seen = group.window - 1 + config.max_tokens_in_flight
    return min(-(-longest // group.block_size), -(-seen // group.block_size) + 1)


def max_sampled_tokens(config: EngineConfig) -> int:
    """Return the maximum of tokens that a step samples: one per sequence and one after each of its drafts."""
    drafts = 0 if config.spec_method == "none" else config.max_draft_tokens
    return min(config.max_batch_size * (1 + drafts), config.step_tokens)


def _workspace_bytes(plan: ModelPlan, layout: KVLayout, config: EngineConfig) -> int:
    """Estimate the peak of the largest step, and what decodes hold between steps.

    Of logits: their product in the model's type, then float32 ones, unedited ones, log-probabilities, those of filtered
    rows, and what a draw makes of these. Decodes hold float32 logits, and a tape's results in memory that is at most
    twice as large.
    """
    size, rows = plan.dtype.itemsize, max_sampled_tokens(config)
    decoded, vocab = min(config.max_batch_size, config.step_tokens), plan.config.text.get_int("vocab_size")
    step = config.step_tokens * _token_entries(plan, layout) * size
    decodes = decoded * (vocab * (4 + 2 * size) + 2 * _token_entries(plan, layout) * size)
    return _with_kept(step + decodes + rows * vocab * (size + 5 * 4))


def _with_kept(nbytes: int) -> int:
    """Add what the allocator keeps of freed memory."""
    return nbytes + min(nbytes, _KEPT_BYTES)


def _token_entries(plan: ModelPlan, layout: KVLayout) -> int:
    """Return the most entries that a token's activations have at a time.

    A residual, a normed copy, q, k, v and their rotated copies, and gate_up with its product, or those of its experts;
    with embeddings of each layer, these, their projections and their sums.
    """
    text = plan.config.text
    hidden = text.get_int("hidden_size")
    heads = max(spec.head_dim * (spec.num_heads + 2 * spec.num_kv_heads) for spec in layout.specs)
    wide = 2 if text.get_bool("use_double_wide_mlp", False) else 1
    feed_forward = 3 * wide * text.get_int("intermediate_size", 4 * hidden)
    experts = text.get_int("num_experts_per_tok", text.get_int("top_k_experts", 0, minimum=0), minimum=0)
    width = text.get_int("moe_intermediate_size", text.get_int("intermediate_size", 4 * hidden))
    per_layer = len(layout.specs) * text.get_int("hidden_size_per_layer_input", 0, minimum=0)
    return 3 * hidden + 2 * heads + feed_forward + experts * (width + hidden) + 3 * per_layer


def _refusal(budget: MemoryBudget, plan: ModelPlan, config: EngineConfig) -> ConfigError:
    draft = f" + draft model {budget.draft_bytes / GIB:.2f}" if budget.draft_bytes else ""
    rest = f"KV cache {budget.kv_bytes / GIB:.2f} + workspace {budget.workspace_bytes / GIB:.2f}{draft} GiB"
    if budget.weight_bytes + budget.draft_weight_bytes + budget.loading_bytes > budget.available_bytes:
        rest = f"loading {budget.loading_bytes / GIB:.2f}{draft} GiB"
    available = f"the {budget.available_bytes / GIB:.2f} GiB available"
    needs = f"weights {budget.weight_bytes / GIB:.2f} + {rest} do not fit in {available}"
    if (flags := _fitting_flags(budget, plan, config)) is not None:
        key = "num_kv_blocks" if flags.startswith("--kv-blocks") else "model"
        value = budget.num_kv_blocks if key == "num_kv_blocks" else config.model
        return ConfigError(key, value, "memory", f"{needs}; {flags} would")
    left = budget.available_bytes - _workspace_bytes(plan, plan.kv_layout, _smaller_steps(config, *_STEP_SIZES[-1]))
    most = f"of at most about {left / GIB:.2f} GiB of weights" if left > 0 else "or free some memory"
    advice = f"choose a smaller --model {most}, and lower --max-num-batched-tokens"
    return ConfigError("model", config.model, "memory", f"{needs}; {advice}")


# Tokens and sequences of a step to try when it does not fit, and the shortest context worth starting a model for.
_STEP_SIZES = ((1 << 62, 1 << 62), (2048, 256), (512, 64), (128, 16))
_LEAST_CONTEXT_TOKENS = 1024


def _fitting_flags(budget: MemoryBudget, plan: ModelPlan, config: EngineConfig) -> str | None:
    """Return flags with which the model fits: fewer blocks, smaller steps, or int8 weights, in this order."""
    for quantization in dict.fromkeys((config.quantization, config.quantization or "int8")):
        fewer_bytes = quantization != config.quantization
        if fewer_bytes and config.load_format == "dummy":
            continue
        if fewer_bytes:
            smaller_config = attrs.evolve(config, quantization=quantization)
            plan = inspect_model(smaller_config, plan.dtype, as_stored=plan.as_stored, keeps=plan.keeps)
        loading = _loading_bytes(plan, None) if budget.loading_bytes else 0
        if plan.weight_bytes + budget.draft_weight_bytes + loading > budget.available_bytes:
            continue
        for size in _STEP_SIZES:
            smaller = _smaller_steps(config, *size)
            fixed = plan.weight_bytes + _workspace_bytes(plan, plan.kv_layout, smaller) + budget.draft_weight_bytes
            blocks = (budget.available_bytes - fixed) // (budget.block_bytes + budget.draft_block_bytes)
            if blocks < _min_blocks(plan, smaller):
                continue
            flags = ["--quantization int8"] if fewer_bytes else []
            if smaller.step_tokens < config.step_tokens:
                flags.append(f"--max-num-batched-tokens {smaller.step_tokens}")
            if smaller.max_batch_size < config.max_batch_size:
                flags.append(f"--max-batch-size {smaller.max_batch_size}")
            if blocks < budget.num_kv_blocks:
                flags.append(f"--kv-blocks {blocks}")
            return " ".join(flags)
    return None


def _smaller_steps(config: EngineConfig, max_tokens: int, max_sequences: int) -> EngineConfig:
    return attrs.evolve(
        config,
        max_num_batched_tokens=min(config.step_tokens, max_tokens),
        max_batch_size=min(config.max_batch_size, max_sequences),
    )


def _min_blocks(plan: ModelPlan, config: EngineConfig) -> int:
    """Return the blocks that one sequence of a useful length needs, the null block included.

    An explicit --kv-blocks may be lower.
    """
    if config.num_kv_blocks is not None:
        return 2
    longest = config.max_model_len or min(plan.max_model_len, _LEAST_CONTEXT_TOKENS)
    sequence = attrs.evolve(config, max_model_len=longest)
    return 1 + sum(_max_blocks(group, plan, sequence) for group in plan.kv_layout.groups)


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory available to this process: the machine's, or less if its control groups limit it.

    Page cache counts as available, since the kernel can reclaim it. `root` is the parent of /proc and /sys.
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
        limit = read_file(directory / "memory.max")
        if limit.isdecimal():
            yield _left(int(limit), directory / "memory.current", directory / "memory.stat", "inactive_file")
    for directory in control_groups(root, "memory"):
        limit = read_file(directory / "memory.limit_in_bytes")
        if limit.isdecimal():
            usage = directory / "memory.usage_in_bytes"
            yield _left(int(limit), usage, directory / "memory.stat", "total_inactive_file")


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the directories of this process's control group and all above it; controller "" is version 2."""
    for line in read_file(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
            # Inside a container the path may be the host's, and only the mount itself is visible.
            own = mount / path.lstrip("/")
            yield from (own, *(above for above in own.parents if above.is_relative_to(mount)))


def _left(limit: int, usage: Path, stat: Path, cached: str) -> int:
    reclaimable = [line.split()[1] for line in read_file(stat).splitlines() if line.split()[0] == cached]
    return limit - int(read_file(usage) or 0) + int(reclaimable[0] if reclaimable else 0)


def read_file(path: Path) -> str:
    """Return the stripped text of a file; "" where there is none."""
    return path.read_text().strip() if path.is_file() else ""
