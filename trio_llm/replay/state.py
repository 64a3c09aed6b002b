"""The whole state of scheduler and block manager as plain data: taken, compared, stored, and brought back to life.

Every file of a record but the first begins with one, and so does every step back. Without tokens, the state has their
numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Struct

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.block_pool import BlockPool
from trio_llm.core.prefix import Chain
from trio_llm.core.prompt_lookup import PromptLookup
from trio_llm.core.running_step import RunningStep
from trio_llm.core.scheduler import Scheduler
from trio_llm.core.sequence import Sequence, Status, StopCondition
from trio_llm.core.sequence_blocks import SequenceBlocks
from trio_llm.messages import BlockGrant
from trio_llm.replay.request import PLAIN, Request

KEY_BYTES = 8
"""Of each digest of the prefix cache: enough to tell apart what one record contains."""

Tokens = tuple[int, ...] | int
"""Token ids, or their number in a state without tokens."""

MakeChain = Callable[[int], Chain | None]

# Fields that are stored as they are.
_SEQUENCE = ("computed", "scheduled", "target", "prompt_computed", "cached_tokens", "announced", "num_preemptions")
_SEQUENCE_FLAGS = ("failed", "known_to_blocks", "known_to_runner")
_BLOCKS = ("num_tokens", "read_cache", "capacity", "registered", "register_at", "reserved", "needs", "readmit_tokens")
_STEP = ("ends", "samples", "prefills", "num_tokens", "num_prefill_tokens")


class SequenceState(Struct, frozen=True, array_like=True):
    """One sequence. `fields` are those of _SEQUENCE and _SEQUENCE_FLAGS; `followers` are places among the sequences."""

    request: Request
    arrival: int
    status: str
    fields: tuple[int | bool | None, ...]
    tokens: Tokens
    unsent: Tokens
    drafts: Tokens
    followers: tuple[int, ...]
    num_scored: int
    num_indexed: int


class BlocksState(Struct, frozen=True, array_like=True):
    """The KV manager's state of one sequence. `fields` are those of _BLOCKS."""

    request_id: int
    fields: tuple[int | bool, ...]
    tables: tuple[tuple[int, ...], ...]
    live_from: tuple[int, ...]
    was_admitted: bool
    hashed: bool


class StepState(Struct, frozen=True, array_like=True):
    """A step in flight. `rows` and `started` are places among the sequences; `fields` are those of _STEP."""

    grant: BlockGrant
    rows: tuple[int, ...]
    started: tuple[int, ...]
    fields: tuple[Any, ...]


class PoolState(Struct, frozen=True, array_like=True):
    """The pool. Of a block that is not in the prefix cache, the key is empty."""

    references: tuple[int, ...]
    groups: tuple[int, ...]
    keys: tuple[bytes, ...]
    free: tuple[int, ...]
    used_blocks: tuple[int, ...]
    cached_blocks: int


class State(Struct, frozen=True, array_like=True):
    """Scheduler and block manager between two calls; no ask is open.

    Attributes:
        sequences: The live ones, then others that steps in flight or the release refer to.
        running, waiting, to_release: Places among the sequences, in order.
    """

    sequences: tuple[SequenceState, ...]
    num_live: int
    running: tuple[int, ...]
    waiting: tuple[int, ...]
    num_held: int
    to_release: tuple[int, ...]
    to_drop: tuple[int, ...]
    in_flight: tuple[StepState, ...]
    num_arrivals: int
    step: int
    num_preempted: int
    blocks: tuple[BlocksState, ...]
    reserved_blocks: int
    last_step: int
    pool: PoolState


class _Places:
    """Gives each sequence its place."""

    def __init__(self, live: Iterable[Sequence]) -> None:
        self.sequences = list(live)
        self._places = {id(sequence): at for at, sequence in enumerate(self.sequences)}

    def of(self, sequences: Iterable[Sequence]) -> tuple[int, ...]:
        return tuple([self._place(sequence) for sequence in sequences])

    def _place(self, sequence: Sequence) -> int:
        at = self._places.setdefault(id(sequence), len(self.sequences))
        if at == len(self.sequences):
            self.sequences.append(sequence)
        return at


def capture(scheduler: Scheduler, blocks: BlockManager, *, tokens: bool) -> State:
    """Return the state. Milliseconds for a pool of ten thousand blocks."""
    assert scheduler._asked is None, "a grant is on its way"
    queues = scheduler._queues
    live = list(queues._live.values())
    places = _Places(live)
    in_flight = tuple(
        StepState(step.grant, places.of(step.rows), places.of(step.started), _fields(step, _STEP))
        for step in scheduler._in_flight
    )
    to_release = places.of(scheduler._to_release)
    for sequence in live:
        places.of(sequence.followers)
    return State(
        sequences=tuple(_sequence(sequence, places, tokens=tokens) for sequence in places.sequences),
        num_live=len(live),
        running=places.of(queues.running),
        waiting=places.of(queues.waiting),
        num_held=queues.num_held,
        to_release=to_release,
        to_drop=tuple(scheduler._to_drop),
        in_flight=in_flight,
        num_arrivals=scheduler._num_arrivals,
        step=scheduler._step,
        num_preempted=scheduler._num_preempted,
        blocks=tuple(map(_blocks, blocks._sequences.values())),
        reserved_blocks=blocks._reserved_blocks,
        last_step=blocks._last_step,
        pool=_pool(blocks._pool),
    )


def _fields(value: object, names: tuple[str, ...]) -> tuple[Any, ...]:
    found = [getattr(value, name) for name in names]
    return tuple([tuple(one) if isinstance(one, list) else one for one in found])


def _sequence(sequence: Sequence, places: _Places, *, tokens: bool) -> SequenceState:
    def kept(token_ids: Iterable[int]) -> Tokens:
        given = tuple(token_ids)
        return given if tokens else len(given)

    return SequenceState(
        request=Request.of(sequence.request_id, sequence.submission, tokens=tokens),
        arrival=sequence.key[1],
        status=sequence.status.value,
        fields=_fields(sequence, _SEQUENCE + _SEQUENCE_FLAGS),
        tokens=kept(sequence.tokens),
        unsent=kept(sequence.unsent),
        drafts=kept(sequence.drafts),
        followers=places.of(sequence.followers),
        num_scored=len(sequence.prompt_logprobs),
        num_indexed=sequence.lookup._indexed if tokens and sequence.lookup is not None else 0,
    )


def _blocks(sequence: SequenceBlocks) -> BlocksState:
    return BlocksState(
        sequence.request_id,
        _fields(sequence, _BLOCKS),
        tuple(map(tuple, sequence.tables)),
        tuple(sequence.live_from),
        sequence.was_admitted,
        sequence.chain is not None,
    )


def _pool(pool: BlockPool) -> PoolState:
    return PoolState(
        tuple(pool._references),
        tuple(pool._group),
        tuple([b"" if digest is None else digest[:KEY_BYTES] for digest in pool._digest]),
        tuple(pool._free),
        tuple(pool.used_blocks),
        pool.cached_blocks,
    )


# --- back to life ------------------------------------------------------------------------------------------------


def restore(state: State, scheduler: Scheduler, blocks: BlockManager, make_chain: MakeChain) -> None:
    """Bring a scheduler and a block manager that have seen nothing to a state.

    `make_chain` returns the keys of a sequence in the prefix cache.
    """
    sequences = [_revived(one, scheduler) for one in state.sequences]

    def find(places: Iterable[int]) -> list[Sequence]:
        return [sequences[at] for at in places]

    for sequence, one in zip(sequences, state.sequences, strict=True):
        sequence.followers = find(one.followers)
    queues = scheduler._queues
    queues._live = {sequence.request_id: sequence for sequence in sequences[: state.num_live]}
    queues.running, queues.waiting = find(state.running), find(state.waiting)
    queues.num_held = state.num_held
    scheduler._to_release, scheduler._to_drop = find(state.to_release), list(state.to_drop)
    scheduler._num_arrivals, scheduler._step = state.num_arrivals, state.step
    scheduler._num_preempted = state.num_preempted
    for step in state.in_flight:
        fields = dict(zip(_STEP, map(_mutable, step.fields), strict=True))
        scheduler._in_flight.append(RunningStep(step.grant, find(step.rows), find(step.started), **fields))
    blocks._sequences = {one.request_id: _revived_blocks(one, make_chain) for one in state.blocks}
    blocks._reserved_blocks, blocks._last_step = state.reserved_blocks, state.last_step
    _revive_pool(state.pool, blocks._pool)


def _mutable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _revived(state: SequenceState, scheduler: Scheduler) -> Sequence:
    submission = state.request.submission()
    prompt = submission.prompt_token_ids
    sequence = Sequence(
        state.request.request_id,
        submission,
        (scheduler.level_of(submission), state.arrival),
        StopCondition.of(submission.params, len(prompt), scheduler._max_model_len, scheduler._eos_token_ids),
        list(_revived_tokens(state.tokens)),
        status=Status(state.status),
    )
    for name, value in zip(_SEQUENCE + _SEQUENCE_FLAGS, state.fields, strict=True):
        setattr(sequence, name, value)
    sequence.unsent = _revived_tokens(state.unsent)
    sequence.drafts = _revived_tokens(state.drafts)
    sequence.prompt_logprobs = [None] * state.num_scored
    speculation = scheduler._speculation
    if state.num_indexed and speculation is not None and speculation.lookup is not None:
        sequence.lookup = PromptLookup(speculation.lookup)
        sequence.lookup._index(sequence.tokens, state.num_indexed)
    return sequence


def _revived_tokens(tokens: Tokens) -> tuple[int, ...]:
    return (PLAIN,) * tokens if isinstance(tokens, int) else tuple(tokens)


def _revived_blocks(state: BlocksState, make_chain: MakeChain) -> SequenceBlocks:
    fields: Mapping[str, Any] = dict(zip(_BLOCKS, state.fields, strict=True))
    return SequenceBlocks(
        request_id=state.request_id,
        chain=make_chain(state.request_id) if state.hashed else None,
        tables=[list(table) for table in state.tables],
        live_from=list(state.live_from),
        was_admitted=state.was_admitted,
        **fields,
    )


def _revive_pool(state: PoolState, pool: BlockPool) -> None:
    pool._references, pool._group = list(state.references), list(state.groups)
    pool._digest = [key or None for key in state.keys]
    pool._content = list(state.keys)
    pool._free.clear()
    pool._free.update(dict.fromkeys(state.free))
    pool.used_blocks, pool.cached_blocks = list(state.used_blocks), state.cached_blocks
    for block, key in enumerate(state.keys):
        if key:
            pool._cached[pool._group[block]][key] = block
