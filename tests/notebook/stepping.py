"""A core that is stepped by hand, with a runner that samples by counting: what pictures are drawn from."""

from __future__ import annotations

from collections.abc import Sequence

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.messages import StepPlan, StepResult
from trio_llm.model_info import KVGroup
from trio_llm.notebook.timeline import History
from trio_llm.params import SamplingParams, Submission


def words(token_ids: Sequence[int]) -> str:
    """Decode as a tokenizer of numbered words would."""
    return " ".join(f"w{token_id}" for token_id in token_ids)


class Hand:
    """Scheduler, block manager and history; the fake model samples 1000 plus the step, so none ends a request."""

    def __init__(self, *, num_blocks: int = 21, budget_tokens: int = 32) -> None:
        self.blocks = BlockManager(num_blocks=num_blocks, groups=(KVGroup((0,), 16),), secret=b"x")
        self.scheduler = Scheduler(
            max_num_batched_tokens=budget_tokens,
            max_batch_size=8,
            max_model_len=self.blocks.max_tokens(),
            eos_token_ids=(2,),
        )
        self.history = History(words, budget_tokens)

    def submit(self, request_id: int, prompt: Sequence[int], max_tokens: int = 8) -> None:
        self.scheduler.submit(request_id, Submission(prompt, SamplingParams(max_tokens=max_tokens)))

    def step(self) -> StepPlan | None:
        ask = self.scheduler.ask()
        assert ask is not None
        grant = self.blocks.reserve(ask)
        plan = self.scheduler.plan(grant)
        result = None
        if plan is not None:
            result = StepResult(plan.step, tuple((1000 + plan.step,) if samples else () for samples in plan.samples))
            self.scheduler.commit(result)
        self.history.add(self.scheduler, self.blocks, grant, plan, result)
        return plan

    def run(self) -> None:
        while self.step():
            pass
