"""The sizes and policies from which a scheduler and a block manager are made, live or in a replay."""

from __future__ import annotations

import attrs

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.prompt_lookup import LookupSizes
from trio_llm.core.scheduler import Scheduler
from trio_llm.core.speculation import Speculation
from trio_llm.model_info import KVGroup


@attrs.frozen(kw_only=True)
class CoreSetup:
    """Everything that determines what the core does with its inputs, apart from the key of the prefix digests.

    Attributes:
        num_kv_blocks: Blocks in the pool, the null block 0 included.
        groups: One block table per sequence and group.
        max_step_tokens: Maximum tokens of one sequence over all steps in flight.
        lookup: Shortest and longest n-gram of prompt look-up; None without it.
        max_draft_tokens: Maximum drafts of one sequence in a step; 0 disables speculative decoding.
        steps_in_flight: Maximum planned steps that are not committed.
        target_step_s: What `StepPace` aims at, in seconds; None or 0 for no pace.

    The others are the settings with these names.
    """

    max_num_batched_tokens: int
    max_batch_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    scheduling_policy: str
    long_prefill_token_threshold: int
    num_kv_blocks: int
    groups: tuple[KVGroup, ...]
    enable_prefix_caching: bool
    max_step_tokens: int
    lookup: tuple[int, int] | None
    max_draft_tokens: int
    steps_in_flight: int
    target_step_s: float | None

    @property
    def speculation(self) -> Speculation | None:
        """Settings of speculative decoding; None without it."""
        if self.max_draft_tokens == 0:
            return None
        return Speculation(self.max_draft_tokens, None if self.lookup is None else LookupSizes(*self.lookup))

    def scheduler(self) -> Scheduler:
        """Return a scheduler that has seen nothing."""
        return Scheduler(
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_batch_size=self.max_batch_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
            policy=self.scheduling_policy,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            speculation=self.speculation,
        )

    def block_manager(self, kind: type[BlockManager] = BlockManager, *, secret: bytes = b"") -> BlockManager:
        """Return a manager of an empty pool."""
        return kind(
            num_blocks=self.num_kv_blocks,
            groups=self.groups,
            enable_prefix_caching=self.enable_prefix_caching,
            secret=secret,
            max_step_tokens=self.max_step_tokens,
        )
