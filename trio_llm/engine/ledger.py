"""The scheduler actor's record of every request it serves: where its replies go and what happened to it when."""

from __future__ import annotations

from typing import Literal

import attrs
import trio

from trio_llm.engine.messages import RequestStats, Submit
from trio_llm.messages import Event, FinishReason, SamplingParams


@attrs.define(eq=False)
class Entry:
    """One live request. Times are Trio's, in seconds."""

    reply: trio.MemorySendChannel[Event]
    family: int
    n: int | None
    max_tokens: int
    num_prompt_tokens: int
    arrived_s: float
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0


@attrs.define(eq=False)
class Tally:
    """What happened to requests since the last report; see `StepReport` for the columns."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_s: list[float] = attrs.field(factory=list[float])
    inter_token_s: list[float] = attrs.field(factory=list[float])
    ended: list[RequestStats] = attrs.field(factory=list[RequestStats])


@attrs.define(eq=False)
class Ledger:
    """All live requests, and the tally that the next report takes."""

    entries: dict[int, Entry] = attrs.field(factory=dict[int, Entry])
    tally: Tally = attrs.field(factory=Tally)
    # First sample's id -> samples of that prompt still live, most tokens of those that ended.
    _families: dict[int, tuple[int, int]] = attrs.field(factory=dict[int, tuple[int, int]])

    def take_tally(self) -> Tally:
        tally, self.tally = self.tally, Tally()
        return tally

    def open(self, submit: Submit) -> None:
        family = submit.request_id if submit.leader is None else submit.leader
        live, most = self._families.get(family, (0, 0))
        self._families[family] = live + 1, most
        n, max_tokens = (
            (submit.params.n, submit.params.max_tokens) if isinstance(submit.params, SamplingParams) else (1, 0)
        )
        self.entries[submit.request_id] = Entry(
            reply=submit.reply,
            family=family,
            n=n if submit.leader is None else None,
            max_tokens=max_tokens or 0,
            num_prompt_tokens=len(submit.prompt_token_ids),
            arrived_s=submit.arrived_s,
        )

    def started(self, request_id: int, now_s: float) -> None:
        """Note a request's first step; after a preemption it is not its first any more."""
        entry = self.entries.get(request_id)
        if entry is not None and entry.started_s is None:
            entry.started_s = now_s

    def preempted(self, request_id: int) -> None:
        if (entry := self.entries.get(request_id)) is not None:
            entry.num_preemptions += 1

    def prompt_done(self, entry: Entry) -> None:
        self.tally.prompt_tokens += entry.num_prompt_tokens
        self.tally.cached_tokens += entry.num_cached_tokens

    def produced(self, entry: Entry, num_tokens: int, now_s: float) -> None:
        """Note tokens of a request."""
        entry.num_generated_tokens += num_tokens
        if entry.last_token_s is not None:
            self.tally.inter_token_s.append(now_s - entry.last_token_s)
        else:
            entry.first_token_s = now_s
            self.tally.first_token_s.append(now_s - entry.arrived_s)
            self.prompt_done(entry)
        entry.last_token_s = now_s

    def close(
        self, request_id: int, reason: FinishReason | Literal["error"], now_s: float, *, corrupted: bool = False
    ) -> None:
        """Note the end of a request; nothing is sent to it any more."""
        entry = self.entries.pop(request_id, None)
        if entry is None:
            return
        entry.reply.close()
        live, most = self._families.pop(entry.family)
        most = max(most, entry.num_generated_tokens)
        if live > 1:
            self._families[entry.family] = live - 1, most
        self.tally.ended.append(
            RequestStats(
                request_id=request_id,
                reason=reason,
                corrupted=corrupted,
                n=entry.n,
                siblings_max_tokens=most if live == 1 else None,
                max_tokens=entry.max_tokens,
                num_prompt_tokens=entry.num_prompt_tokens,
                num_cached_tokens=entry.num_cached_tokens,
                num_generated_tokens=entry.num_generated_tokens,
                num_preemptions=entry.num_preemptions,
                queue_s=_between(entry.arrived_s, entry.started_s),
                prefill_s=_between(entry.started_s, entry.first_token_s),
                decode_s=_between(entry.first_token_s, entry.last_token_s),
                e2e_s=now_s - entry.arrived_s,
            )
        )


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
