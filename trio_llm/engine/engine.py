"""The handle of the engine. Any task of its Trio run may call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import trio
from prometheus_client import CollectorRegistry

from trio_llm.engine.admission import RequestLimits, check_pooling, resolve
from trio_llm.engine.health import FAILING_AFTER_STEPS, Health, Pulse
from trio_llm.engine.history import History
from trio_llm.engine.live import Live
from trio_llm.engine.mailbox import Mailbox
from trio_llm.engine.messages import Abort, Rejected, RequestStats, StepReport, Submit
from trio_llm.engine.metrics import Metrics
from trio_llm.engine.recorder import Recorder
from trio_llm.engine.request_times import RequestTimes
from trio_llm.engine.stream import Stream
from trio_llm.engine.tickets import Tickets
from trio_llm.errors import DrainingError, EngineDeadError, OverloadedError, RequestFailedError
from trio_llm.messages import Embedding, Failed, Finished, FinishReason, StepTrace, Usage
from trio_llm.model_info import ModelInfo
from trio_llm.params import Submission
from trio_llm.replay.explanation import Explanation
from trio_llm.tokenizer import Tokenizer


class Engine:
    """A model that is served; `trio_llm.open_engine` makes it.

    Attributes:
        info: The model; `info.max_model_len` is the maximum prompt plus output.
        registry: The Prometheus registry of this engine.
        limits: The limits of a request.
        trace: The last steps, oldest first, for pictures of the schedule.
        live: The state at this moment, for those who watch it.
    """

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        limits: RequestLimits,
        inbox: trio.MemorySendChannel[Submit | Abort],
        tickets: Tickets,
        pulse: Pulse,
        metrics: Metrics,
        trace: Sequence[StepTrace],
        history: History,
        live: Live,
        recorder: Recorder | None,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.limits = limits
        self._inbox = inbox
        self._tickets = tickets
        self.trace = trace
        self._history = history
        self.live = live
        self._recorder = recorder
        self._pulse = pulse
        self._metrics = metrics
        self._request_ids = count(1)
        self._mailboxes: dict[int, Mailbox] = {}
        self._cancelled: set[int] = set()
        self._draining = False
        self._why_dead: str | None = None

    @property
    def max_requests(self) -> int:
        """Maximum number of running and waiting requests."""
        return self._tickets.limit

    @property
    def registry(self) -> CollectorRegistry:
        return self._metrics.registry

    def watch_ended(self, watch: Callable[[RequestStats], None]) -> None:
        """Call `watch` with the statistics of each request, soon after its end. It must be fast and not raise."""
        self._metrics.watchers.append(watch)

    def watch_steps(self, watch: Callable[[StepReport], None]) -> None:
        """Call `watch` with each step, soon after its end, before the requests that it ended. It must be fast."""
        self._metrics.step_watchers.append(watch)

    def open_stream(self, submission: Submission) -> Stream:
        """Submit one request and return its stream; use it as `async with engine.open_stream(...) as stream`.

        This call raises if the request is refused; nothing is sent then. It ignores `params.n`: n samples are n
        streams, see `open_samples`. It reduces `max_tokens` to what the context has left, and draws a seed if there is
        none.

        Raises:
            InvalidRequestError: The request can never be served. Names the parameter. For a prompt that is too long,
                the code is "context_length_exceeded" and the message has both numbers.
            OverloadedError: The queue is full.
            DrainingError: The engine is shutting down.
            EngineDeadError: The engine stopped.
        """
        times = RequestTimes(trio.current_time())
        request_id, mailbox = self._submit(self.resolve(submission), times)
        return Stream(request_id, submission, self.tokenizer.decode, mailbox, times)

    def resolve(self, submission: Submission) -> Submission:
        """Check a request as `open_stream` does, without submitting it; return it with its final `max_tokens` and seed.

        Raises:
            InvalidRequestError: As `open_stream`.
        """
        return resolve(submission, self.limits)

    def cancel(self, request_id: int) -> bool:
        """End a stream early; its reader gets what there is, with the finish reason "abort".

        Returns whether there is such a stream that has not ended, as far as its reader knows.
        """
        if self._why_dead is not None or request_id not in self._mailboxes:
            return False
        # One that has ended, and is not read yet, no longer counts for the room in the inbox.
        if request_id not in self._cancelled and not self._mailboxes[request_id].ended:
            self._cancelled.add(request_id)
            self._inbox.send_nowait(Abort(request_id, tells=True))
        return True

    async def explain(self, request_id: int) -> Explanation | None:
        """Return where the time of a request went; None if it is not remembered.

        The engine remembers live requests, the last 1,024 that ended, and the steps of the last 65,536 rows.
        """
        return await self._history.explain(request_id)

    async def embed(
        self, submission: Submission, *, submitted: Callable[[int], None] = lambda _: None
    ) -> tuple[tuple[float, ...], Usage]:
        """Return the prompt's embedding. Raises what `open_stream` and its stream raise. Cancelling aborts the request.

        `submitted` is called with the request's id once it is accepted.
        """
        check_pooling(submission, self.limits)
        request_id, mailbox = self._submit(submission, RequestTimes(trio.current_time()))
        submitted(request_id)
        vector: tuple[float, ...] = ()
        try:
            while True:
                for event in await mailbox.receive():
                    match event:
                        case Embedding():
                            vector = event.vector
                        case Finished() if event.reason == "abort":
                            raise RequestFailedError("The request was cancelled.")
                        case Finished():
                            return vector, event.usage
                        case Failed():
                            raise event.error
                        case _:
                            pass
        finally:
            mailbox.close("abort")

    @property
    def recording(self) -> bool | None:
        """Whether steps are recorded; None if there is no directory for records."""
        return None if self._recorder is None else self._recorder.recording

    def record(self, on: bool) -> None:
        """Stop recording, or go on in a new file, from the next step. Needs a directory for records."""
        assert self._recorder is not None
        self._recorder.record(on)

    def health(self) -> Health:
        """Return the engine's health. Cheap; never blocks."""
        num_running = self._pulse.num_running
        # The scheduler reads new requests between two steps: those it has not read wait too.
        num_waiting = max(self._pulse.num_waiting, self._tickets.in_use - num_running)
        report = partial(Health, num_running=num_running, num_waiting=num_waiting)
        stalled_s = self._pulse.stalled_s(trio.current_time())
        if self._why_dead is not None:
            return report("dead", self._why_dead)
        if stalled_s:
            return report("stalled", f"There is work, and no step has finished for {stalled_s:.0f} s.")
        if self._pulse.failed_steps >= FAILING_AFTER_STEPS:
            return report("failing", f"In each of the last {self._pulse.failed_steps} steps every request failed.")
        if self._draining:
            return report("draining", "The engine is shutting down.")
        return report("ok")

    def drain(self) -> None:
        """Refuse new requests with DrainingError from now on. Accepted requests run to their end."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Wait until every accepted request has ended. Raises EngineDeadError if the engine stops first."""
        await self._tickets.wait_all_returned()
        if self._why_dead is not None:
            raise EngineDeadError

    async def render_metrics(self) -> bytes:
        """Return all series in Prometheus text format, including everything before this call."""
        self._metrics.catch_up()
        self._metrics.count_accepted(self._tickets.in_use)
        # Building the text takes milliseconds, so it runs in a thread.
        return await trio.to_thread.run_sync(self._metrics.render)

    def die(self, why: str) -> bool:
        """Stop the engine: every open request gets EngineDeadError. For the supervisor, after the actors have ended.

        Returns whether there were open requests.
        """
        if self._why_dead is not None:
            return False
        self._why_dead = why
        self._tickets.give_back(self._tickets.in_use)
        for mailbox in self._mailboxes.values():
            if not mailbox.ended:
                mailbox.put(Failed(EngineDeadError()))
                mailbox.end()
        return bool(self._mailboxes)

    def _submit(self, submission: Submission, times: RequestTimes) -> tuple[int, Mailbox]:
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
        mailbox = Mailbox(partial(self._leave, request_id))
        # The inbox is read before tickets are returned and has room for all messages in between, so it is never full.
        self._inbox.send_nowait(Submit(request_id, submission, times, mailbox))
        self._mailboxes[request_id] = mailbox
        return request_id, mailbox

    def _leave(self, request_id: int, reason: FinishReason | None) -> None:
        """Remove a reader. `reason` is why the rest of its request is not wanted; None if the request has ended."""
        del self._mailboxes[request_id]
        self._cancelled.discard(request_id)
        if reason is not None and self._why_dead is None:
            self._inbox.send_nowait(Abort(request_id, reason))
