"""The path from the scheduler to the model and back: plans go in, results come out in the same order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from trio_llm.engine.recovery import Collect, launch_step
from trio_llm.engine.step_thread import Begun, StepThread, Worker
from trio_llm.messages import StepPlan, StepResult

MAX_STEPS_IN_FLIGHT = 2


class StepPipeline:
    """Steps in flight on the model's thread.

    Args:
        launch: The runner's `launch`. A step that fails is bisected before the next plan is launched.
        worker: Runs launches, one after another, on the model's thread.
        depth: Maximum steps in flight. With one, `worker` waits for each result before it launches the next step.
        collector: With depth two, waits for results while `worker` launches. Default: its own thread.
    """

    def __init__(
        self, launch: Callable[[StepPlan, Begun], Collect], worker: Worker, depth: int, collector: Worker | None = None
    ) -> None:
        self._launch = launch
        self._worker = worker
        self._collector = None if depth == 1 else collector or StepThread("trio-llm-collector")
        self._send_posted, self._posted = trio.open_memory_channel[Callable[[], Awaitable[StepResult]]](
            MAX_STEPS_IN_FLIGHT
        )
        self._send_result, self._results = trio.open_memory_channel[StepResult](MAX_STEPS_IN_FLIGHT)

    def launch(self, plan: StepPlan) -> None:
        """Queue a plan on the model's thread without waiting."""
        self._send_posted.send_nowait(self._post(plan))

    async def next_result(self) -> StepResult:
        """Wait for the next result, in the order of the plans."""
        return await self._results.receive()

    async def run(self) -> None:
        """Run the model runner: wait for each launched step and send its result to the scheduler."""
        async for wait in self._posted:
            self._send_result.send_nowait(await wait())

    def close(self) -> None:
        """End the collector's thread."""
        if self._collector is not None:
            self._collector.close()

    def _post(self, plan: StepPlan) -> Callable[[], Awaitable[StepResult]]:
        if self._collector is None:
            return self._worker.start(self._launch_and_collect, plan)
        launched = self._worker.post(self._launch_step, lambda: None, plan)
        return partial(self._collect, launched, self._collector)

    def _launch_step(self, begun: Begun, plan: StepPlan) -> Collect:
        return launch_step(plan, lambda part: self._launch(part, begun))

    def _launch_and_collect(self, begun: Begun, plan: StepPlan) -> StepResult:
        return self._launch_step(begun, plan)()

    async def _collect(self, launched: Callable[[], Awaitable[Collect]], collector: Worker) -> StepResult:
        return await collector.run(await launched())
