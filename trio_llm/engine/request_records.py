"""The scheduler actor's records of live requests: mailboxes, times and counts."""

from __future__ import annotations

from typing import Literal

import attrs

from trio_llm.engine.mailbox import Mailbox
from trio_llm.engine.messages import RequestStats, Submit
from trio_llm.engine.request_times import RequestTimes
from trio_llm.messages import FinishReason, StepPlan, Usage


@attrs.define(eq=False)
class Entry:
    """One live request."""

    mailbox: Mailbox
    family: int
    n: int | None
    max_tokens: int
    num_prompt_tokens: int
    times: RequestTimes
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0

    @property
    def usage(self) -> Usage:
        return Usage(self.num_prompt_tokens, self.num_generated_tokens, self.num_cached_tokens)


@attrs.define(eq=False)
class Tally:
    """Counts since the last report; see `StepReport` for the columns."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_s: list[float] = attrs.field(factory=list[float])
    inter_token_s: list[float] = attrs.field(factory=list[float])
    ended: list[RequestStats] = attrs.field(factory=list[RequestStats])


@attrs.define(eq=False)
class RequestRecords:
    """All live requests, and the tally for the next report."""

    entries: dict[int, Entry] = attrs.field(factory=dict[int, Entry])
    tally: Tally = attrs.field(factory=Tally)
    # First sample's id -> number of live samples of that prompt, most tokens of those that ended.
    _families: dict[int, tuple[int, int]] = attrs.field(factory=dict[int, tuple[int, int]])

    def take_tally(self) -> Tally:
        tally, self.tally = self.tally, Tally()
        return tally

    def open(self, submit: Submit) -> None:
        submission = submit.submission
        family = submit.request_id if submission.leader is None else submission.leader
        live, max_tokens = self._families.get(family, (0, 0))
        self._families[family] = live + 1, max_tokens
        self.entries[submit.request_id] = Entry(
            mailbox=submit.mailbox,
            family=family,
            n=submission.num_samples if submission.leader is None else None,
            max_tokens=submission.max_tokens,
            num_prompt_tokens=len(submission.prompt_token_ids),
            times=submit.times,
        )

    def started(self, request_id: int, now_s: float) -> None:
        """Record a request's first step. A later start, after a preemption, does not count."""
        entry = self.entries.get(request_id)
        if entry is not None and entry.times.started_s is None:
            entry.times.started_s = now_s

    def preempted(self, request_id: int) -> None:
        if (entry := self.entries.get(request_id)) is not None:
            entry.num_preemptions += 1

    def verified(self, plan: StepPlan) -> None:
        """Record the drafts of a step whose result is there."""
        for request_id, num_drafts in zip(plan.request_ids, plan.drafts, strict=bool(plan.drafts)):
            if num_drafts and (entry := self.entries.get(request_id)) is not None:
                entry.times.num_drafts += num_drafts

    def prompt_done(self, entry: Entry) -> None:
        self.tally.prompt_tokens += entry.num_prompt_tokens
        self.tally.cached_tokens += entry.num_cached_tokens

    def produced(self, entry: Entry, num_tokens: int, now_s: float) -> None:
        """Record generated tokens of a request."""
        entry.num_generated_tokens += num_tokens
        times = entry.times
        times.num_accepted_drafts += num_tokens - 1
        if times.last_token_s is not None:
            self.tally.inter_token_s.append(now_s - times.last_token_s)
        else:
            times.first_token_s = now_s
            self.tally.first_token_s.append(now_s - times.arrived_s)
            self.prompt_done(entry)
        times.last_token_s = now_s

    def close(
        self, request_id: int, reason: FinishReason | Literal["error"], now_s: float, *, corrupted: bool = False
    ) -> None:
        """Record the end of a request and end its mailbox."""
        entry = self.entries.pop(request_id, None)
        if entry is None:
            return
        entry.mailbox.end()
        times = entry.times
        live, max_tokens = self._families.pop(entry.family)
        max_tokens = max(max_tokens, entry.num_generated_tokens)
        if live > 1:
            self._families[entry.family] = live - 1, max_tokens
        self.tally.ended.append(
            RequestStats(
                request_id=request_id,
                reason=reason,
                corrupted=corrupted,
                n=entry.n,
                siblings_max_tokens=max_tokens if live == 1 else None,
                max_tokens=entry.max_tokens,
                num_prompt_tokens=entry.num_prompt_tokens,
                num_cached_tokens=entry.num_cached_tokens,
                num_generated_tokens=entry.num_generated_tokens,
                num_preemptions=entry.num_preemptions,
                num_accepted_drafts=times.num_accepted_drafts,
                queue_s=_between(times.arrived_s, times.started_s),
                prefill_s=_between(times.started_s, times.first_token_s),
                decode_s=_between(times.first_token_s, times.last_token_s),
                e2e_s=now_s - times.arrived_s,
            )
        )


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
