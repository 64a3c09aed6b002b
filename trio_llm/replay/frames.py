"""What a record contains: frames, each of them one call of the core or its result.

The core is a pure state machine. So arrivals, aborts and results are enough to rebuild everything else: what was asked,
granted, planned and evicted. A record keeps a checksum of each grant and plan, to prove that a replay is the same.

Without tokens, a record has lengths and, of the tokens, only keyed digests of whole chunks: its reader can see which
prompts begin alike, and no text.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from trio_llm.core.setup import CoreSetup
from trio_llm.messages import BlockGrant, FinishReason, StepPlan
from trio_llm.replay.request import Request
from trio_llm.replay.state import State

FORMAT = 1
"""Changes when a frame changes its meaning."""


class Header(Struct, frozen=True, array_like=True, tag=0):
    """The first frame of a file.

    Attributes:
        version: Of the trio-llm that wrote it.
        started_at: When time 0 of the record was, in seconds since 1970.
        tokens: Whether the record has token ids.
        state: The core when the file began; None if it had seen nothing.
    """

    version: str
    model: str
    started_at: float
    tokens: bool
    setup: CoreSetup
    state: State | None = None


class Arrival(Struct, frozen=True, array_like=True, tag=1):
    """A request reaches the scheduler. `at_s` is when its client submitted it, from time 0 of the record."""

    at_s: float
    request: Request


class Leave(Struct, frozen=True, array_like=True, tag=2):
    """A request ends early: its client left ("abort"), or found a stop string or a repetition in its text."""

    at_s: float
    request_id: int
    reason: FinishReason


class Planned(Struct, frozen=True, array_like=True, tag=3):
    """Ask, reserve and plan.

    Attributes:
        prompt_tokens: The argument of `Scheduler.ask`.
        drafts: Column `drafts` of the ask if there are any; by prompt look-up they depend on the tokens.
        check: CRC-32 of `decisions`.
    """

    step: int
    at_s: float
    prompt_tokens: int | None
    drafts: tuple[int, ...] | None
    check: int


class Committed(Struct, frozen=True, array_like=True, tag=4):
    """A result, and its commit.

    Attributes:
        at_s: When the result was there, from time 0 of the record.
        seconds: As in StepResult.
        counts: Per row, tokens that were kept; None without speculative decoding: one per row that samples.
        stopped: The sequences that a stop token ended. Empty in a record with tokens, which tell it.
        failed: As in StepResult.
        num_drafts: Per row, the number of a draft model's drafts; None without a draft model.
        token_ids, drafts: As in StepResult, in a record with tokens.
    """

    step: int
    at_s: float
    seconds: float
    counts: tuple[int, ...] | None = None
    stopped: tuple[int, ...] = ()
    failed: dict[int, str] = {}
    num_drafts: tuple[int, ...] | None = None
    token_ids: tuple[tuple[int, ...], ...] | None = None
    drafts: tuple[tuple[int, ...], ...] | None = None


class Keys(Struct, frozen=True, array_like=True, tag=5):
    """Keys of a sequence's chunks in the prefix cache, KEY_BYTES each, from chunk `first` on.

    They come late: a reader takes them all before it replays.
    """

    request_id: int
    first: int
    keys: bytes


Frame = Header | Arrival | Leave | Planned | Committed | Keys
Call = Arrival | Leave | Planned | Committed

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Frame).decode


def decisions(grant: BlockGrant, plan: StepPlan | None) -> bytes:
    """Return what a grant and a plan decide, as bytes. Their tokens are not in it."""
    planned = () if plan is None else (plan.request_ids, plan.samples, plan.dropped, plan.draft_limits)
    return encode(
        (
            grant.request_ids,
            grant.starts,
            grant.counts,
            grant.new_blocks,
            grant.num_admitted,
            grant.preempted,
            grant.drafts,
            grant.capacities,
            planned,
        )
    )
