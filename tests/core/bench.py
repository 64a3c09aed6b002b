"""A scheduler and a block manager on the bench: no model, the tests say which tokens come out."""

from __future__ import annotations

from collections.abc import Sequence

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.messages import BlockAsk, BlockGrant, Commit, Event, StepPlan, StepResult
from trio_llm.model_info import KVGroup
from trio_llm.params import PoolingParams, SamplingParams, Submission

PLAIN = 9
"""The token that comes out unless a test says otherwise; it ends nothing."""


class Bench:
    """Steps the two by hand and remembers everything that was said."""

    def __init__(
        self,
        groups: tuple[KVGroup, ...] = (KVGroup((0,), 4),),
        *,
        num_blocks: int = 64,
        caching: bool = True,
        max_num_batched_tokens: int = 32,
        max_batch_size: int = 8,
        max_model_len: int = 64,
        eos: Sequence[int] = (0,),
        policy: str = "fcfs",
        threshold: int = 0,
        depth: int = 1,
    ) -> None:
        self.blocks = BlockManager(
            num_blocks=num_blocks,
            groups=groups,
            enable_prefix_caching=caching,
            secret=b"key",
            max_step_tokens=depth * min(threshold or max_num_batched_tokens, max_num_batched_tokens),
        )
        self.scheduler = Scheduler(
            max_num_batched_tokens=max_num_batched_tokens,
            max_batch_size=max_batch_size,
            max_model_len=min(max_model_len, self.blocks.max_tokens()),
            eos_token_ids=eos,
            policy=policy,
            long_prefill_token_threshold=threshold,
        )
        self.events: dict[int, list[Event]] = {}
        self.asks: list[BlockAsk] = []
        self.grants: list[BlockGrant] = []
        self.commits: list[Commit] = []

    def submit(
        self,
        request_id: int,
        prompt: int | Sequence[int],
        params: SamplingParams | PoolingParams | None = None,
        *,
        priority: int = 0,
        salt: bytes = b"",
        leader: int | None = None,
    ) -> None:
        """Submit a prompt, or one of so many tokens that no other request has; for 40 output tokens by default."""
        tokens = unique(request_id, prompt) if isinstance(prompt, int) else prompt
        params = params or SamplingParams(max_tokens=40)
        self.scheduler.submit(request_id, Submission(tokens, params, priority=priority, salt=salt, leader=leader))

    def ask(self) -> BlockAsk | None:
        ask = self.scheduler.ask()
        if ask is not None:
            self.asks.append(ask)
        return ask

    def reserve(self, ask: BlockAsk) -> BlockGrant:
        self.grants.append(self.blocks.reserve(ask))
        return self.grants[-1]

    def plan(self) -> StepPlan | None:
        """Go as far as the plan."""
        ask = self.ask()
        return None if ask is None else self.scheduler.plan(self.reserve(ask))

    def commit(
        self, plan: StepPlan, tokens: dict[int, int] | None = None, failed: dict[int, str] | None = None
    ) -> None:
        """Let the runner have sampled `tokens` by request, PLAIN where nothing is said."""
        failed = failed or {}
        sampled = tuple(
            ((tokens or {}).get(request_id, PLAIN),) if samples and request_id not in failed else ()
            for request_id, samples in zip(plan.request_ids, plan.samples, strict=True)
        )
        embeddings = dict.fromkeys(plan.request_ids, (1.0,))
        commit = self.scheduler.commit(StepResult(plan.step, sampled, embeddings=embeddings, failed=failed))
        self.commits.append(commit)
        for request_id, event in commit.events:
            self.events.setdefault(request_id, []).append(event)

    def step(self, tokens: dict[int, int] | None = None, failed: dict[int, str] | None = None) -> dict[int, int]:
        """Do one step and return how many tokens each row computed."""
        plan = self.plan()
        if plan is None:
            return {}
        self.commit(plan, tokens, failed)
        return dict(zip(plan.request_ids, plan.counts, strict=True))

    def waiting(self) -> list[int]:
        return [sequence.request_id for sequence in self.scheduler.waiting]

    def running(self) -> list[int]:
        return [sequence.request_id for sequence in self.scheduler.running]

    def last(self, request_id: int) -> Event:
        return self.events[request_id][-1]

    def count(self, state: str) -> int:
        """Return how many blocks are empty, cached or used."""
        return sum(block.state == state for block in self.blocks.blocks())


def unique(request_id: int, length: int) -> tuple[int, ...]:
    """Return a prompt that shares no block with another request's."""
    return tuple(1000 * request_id + at for at in range(length))
