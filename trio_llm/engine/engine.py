"""The handle that clients of the engine hold. Everything on it is safe to call from any task of its Trio run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import trio
from prometheus_client import CollectorRegistry

from trio_llm.engine.admission import Limits, check_pooling, resolve
from trio_llm.engine.health import FAILING_AFTER_STEPS, Health, Pulse
from trio_llm.engine.mailbox import Mailbox
from trio_llm.engine.messages import Abort, Rejected, RequestStats, StepReport, Submit
from trio_llm.engine.metrics import Metrics
from trio_llm.engine.stream import Stream
from trio_llm.engine.tickets import Tickets
from trio_llm.errors import DrainingError, EngineDeadError, OverloadedError
from trio_llm.messages import (
    Embedding,
    Event,
    Failed,
    Finished,
    FinishReason,
    ModelInfo,
    PoolingParams,
    SamplingParams,
    StepTrace,
    Usage,
)
from trio_llm.tokenizer import Tokenizer

# Events of a request that are not tokens: Started, PromptLogprobs, Embedding, Finished or Failed, with room to spare.
_OTHER_EVENTS = 8


class Engine:
    """One model being served; made by `trio_llm.open_engine`.

    Attributes:
        info: What is served; `info.max_model_len` is the longest prompt plus output that is accepted.
        registry: Prometheus registry of this engine alone; the server adds its own series to it.
        limits: What a request must keep to.
        trace: The last steps, oldest first, for pictures of the schedule.
    """

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        limits: Limits,
        inbox: trio.MemorySendChannel[Submit | Abort],
        tickets: Tickets,
        pulse: Pulse,
        metrics: Metrics,
        trace: Sequence[StepTrace],
        stall_after_s: float,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.limits = limits
        self._inbox = inbox
        self._tickets = tickets
        self.trace = trace
        self._pulse = pulse
        self._metrics = metrics
        self._stall_after_s = stall_after_s
        self._request_ids = count(1)
        self._replies: dict[int, trio.MemorySendChannel[Event]] = {}
        self._draining = False
        self._why_dead: str | None = None

    @property
    def max_requests(self) -> int:
        """Requests that may run and wait at the same time; one more is refused."""
        return self._tickets.limit

    @property
    def registry(self) -> CollectorRegistry:
        return self._metrics.registry

    def watch_ended(self, watch: Callable[[RequestStats], None]) -> None:
        """Call `watch` with what became of each request, soon after its end; it must be quick and not raise."""
        self._metrics.watchers.append(watch)

    def watch_steps(self, watch: Callable[[StepReport], None]) -> None:
        """Call `watch` with each step, soon after its end and before what ended with it; quick, and not to raise."""
        self._metrics.step_watchers.append(watch)

    def open_stream(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        leader: int | None = None,
        background: bool = False,
    ) -> Stream:
        """Submit one request and return its stream; use it as `async with engine.open_stream(...) as stream`.

        Refusals are raised here, at the call, before anything was sent to anyone. `params.n` is not looked at:
        n samples are n streams, see `open_samples`. `max_tokens` is clamped to what is left of the context.

        Args:
            prompt_token_ids: At least one.
            params: How to sample and when to stop; a `seed` of None draws a fresh one.
            priority: Smaller goes first, under the "priority" policy.
            salt: Requests share cached prompt blocks only within one salt.
            background: Wait behind all requests that are not, whatever the policy, and be preempted before them.
            leader: The request_id of an open stream with the same prompt whose prefill this one waits for.

        Raises:
            InvalidRequestError: It can never be served; names the parameter. Too long a prompt has the code
                "context_length_exceeded" and both numbers in its message.
            OverloadedError: The queue is full.
            DrainingError: The engine is shutting down.
            EngineDeadError: The engine stopped.
        """
        final = resolve(params, prompt_token_ids, self.limits)
        request_id, mailbox = self._submit(
            prompt_token_ids, final, final.max_tokens or 0, (background, priority), salt, leader
        )
        decode = partial(self.tokenizer.decode, skip_special_tokens=params.skip_special_tokens)
        return Stream(request_id, prompt_token_ids, params, decode, mailbox)

    async def embed(
        self,
        prompt_token_ids: Sequence[int],
        params: PoolingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        background: bool = False,
        submitted: Callable[[int], None] = lambda _: None,
    ) -> tuple[tuple[float, ...], Usage]:
        """Return the prompt's embedding. Raises what `open_stream` and its iteration raise; cancelling aborts.

        `submitted` is called with the request's number once it is accepted.
        """
        check_pooling(params, prompt_token_ids, self.limits)
        request_id, mailbox = self._submit(prompt_token_ids, params, 0, (background, priority), salt, None)
        submitted(request_id)
        vector: tuple[float, ...] = ()
        try:
            while True:
                for event in await mailbox.receive():
                    match event:
                        case Embedding():
                            vector = event.vector
                        case Finished():
                            return vector, event.usage
                        case Failed():
                            raise event.error
                        case _:
                            pass
        finally:
            mailbox.close("abort")

    def health(self) -> Health:
        """Say whether requests are served right now. Cheap, never blocks, asks nobody."""
        report = partial(Health, num_running=self._pulse.num_running, num_waiting=self._pulse.num_waiting)
        stalled_s = self._pulse.stalled_s(trio.current_time())
        if self._why_dead is not None:
            return report("dead", self._why_dead)
        if stalled_s > self._stall_after_s:
            return report("stalled", f"There is work, and no step has finished for {stalled_s:.0f} s.")
        if self._pulse.failed_steps >= FAILING_AFTER_STEPS:
            return report("failing", f"In each of the last {self._pulse.failed_steps} steps every request failed.")
        if self._draining:
            return report("draining", "The engine is shutting down.")
        return report("ok")

    def drain(self) -> None:
        """Refuse new requests with DrainingError from now on; accepted ones run to their end."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Wait until every accepted request has ended. Raises EngineDeadError if the engine stops first."""
        await self._tickets.wait_all_returned()
        if self._why_dead is not None:
            raise EngineDeadError

    async def render_metrics(self) -> bytes:
        """Return all series in Prometheus text format, everything that happened before this call included."""
        self._metrics.catch_up()
        # Milliseconds of string building; meanwhile the loop goes on.
        return await trio.to_thread.run_sync(self._metrics.render)

    def die(self, why: str) -> bool:
        """Stop for good: every open request gets EngineDeadError. For the supervisor, after the actors have ended.

        Returns whether there was any.
        """
        if self._why_dead is not None:
            return False
        self._why_dead = why
        self._tickets.give_back(self._tickets.in_use)
        for reply in self._replies.values():
            try:
                reply.send_nowait(Failed(EngineDeadError()))
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                continue  # It had its last event already, or its reader is gone.
            reply.close()
        return bool(self._replies)

    def _submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | PoolingParams,
        max_tokens: int,
        rank: tuple[bool, int],
        salt: bytes,
        leader: int | None,
    ) -> tuple[int, Mailbox]:
        if self._why_dead is not None:
            raise EngineDeadError
        if self._draining:
            self._metrics.report(Rejected("draining"))
            raise DrainingError
        try:
            self._tickets.take()
        except OverloadedError:
            self._metrics.report(Rejected("overloaded"))
            raise
        request_id = next(self._request_ids)
        send, receive = trio.open_memory_channel[Event](max_tokens + _OTHER_EVENTS)
        prompt = tuple(prompt_token_ids)
        # The inbox is read before tickets come back, and has room for all that may be said between: it is never full.
        self._inbox.send_nowait(
            Submit(request_id, prompt, params, *rank, salt, leader, trio.current_time(), reply=send)
        )
        self._replies[request_id] = send
        return request_id, Mailbox(receive, partial(self._leave, request_id))

    def _leave(self, request_id: int, reason: FinishReason | None) -> None:
        """Forget a reader; `reason` is why the rest of its request is not wanted, None where there is none."""
        del self._replies[request_id]
        if reason is not None and self._why_dead is None:
            self._inbox.send_nowait(Abort(request_id, reason))
