"""The real scheduler and block manager, driven by the frames of a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from zlib import crc32

import attrs

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.prefix import Chain
from trio_llm.core.prompt_lookup import LookupSizes, PromptLookup
from trio_llm.core.running_step import RunningStep
from trio_llm.core.scheduler import Scheduler
from trio_llm.core.setup import CoreSetup
from trio_llm.errors import RecordError
from trio_llm.messages import Admit, BlockAsk, BlockGrant, Commit, StepPlan, StepResult, TokenLogprobs
from trio_llm.replay.frames import Arrival, Call, Committed, Leave, Planned, decisions
from trio_llm.replay.request import PLAIN, STOP, Request
from trio_llm.replay.state import KEY_BYTES, State, capture, restore

KeysOf = Mapping[int, bytes]
"""request_id -> the keys of its chunks in the prefix cache, KEY_BYTES each."""


class RecordedChain(Chain):
    """A sequence's keys in the prefix cache, as they were recorded; its tokens do not matter."""

    __slots__ = ("_keys", "_request_id")

    def __init__(self, request_id: int, keys: bytes, chunk_tokens: int) -> None:
        super().__init__(b"", b"", (), chunk_tokens)
        self._request_id = request_id
        self._keys = keys

    def block(self, index: int, block_size: int) -> tuple[bytes, bytes]:
        """Return key and content of a block: the key of its last chunk stands for both."""
        last = (index + 1) * (block_size // self._chunk_tokens) - 1
        key = self._keys[last * KEY_BYTES : (last + 1) * KEY_BYTES] or self._unrecorded(last)
        return key, key

    def _unrecorded(self, last: int) -> bytes:
        """Return a key that no other sequence has, for one that came after the end of the record."""
        key = b"%d/%d" % (self._request_id, last)
        # States keep KEY_BYTES of a key. Short ones stay readable, as they are in the capsules that exist.
        return key if len(key) <= KEY_BYTES else blake2b(key, digest_size=KEY_BYTES).digest()


class RecordedBlocks(BlockManager):
    """A block manager that finds in the prefix cache what was found when the record was made."""

    keys: KeysOf

    def recorded_chain(self, request_id: int) -> Chain:
        return RecordedChain(request_id, self.keys.get(request_id, b""), self._chunk_tokens)

    def _chain(self, admit: Admit) -> Chain:
        return self.recorded_chain(admit.request_id)


class _RecordedDrafts(PromptLookup):
    """Proposes as many drafts as were proposed when the record was made."""

    def __init__(self, num_drafts: int) -> None:
        super().__init__(LookupSizes(1, 1))
        self._num_drafts = num_drafts

    def propose(self, tokens: Sequence[int], max_drafts: int) -> tuple[int, ...]:  # noqa: ARG002 - only their number
        return (PLAIN,) * min(self._num_drafts, max_drafts)


@attrs.frozen
class PlannedStep:
    """One step up to its plan, which is None if there was nothing to run."""

    ask: BlockAsk
    grant: BlockGrant
    plan: StepPlan | None


class Machine:
    """Scheduler and block manager, driven by frames.

    Attributes:
        requests: Every request that arrived or was there at the start, by its id.
        planned: The steps in flight that were planned here, by their number.
    """

    def __init__(self, setup: CoreSetup, keys: KeysOf, *, tokens: bool, state: State | None = None) -> None:
        self.setup = setup
        self.tokens = tokens
        self.requests: dict[int, Request] = {}
        self.planned: dict[int, PlannedStep] = {}
        self._keys = keys
        self.reset(state)

    def reset(self, state: State | None) -> None:
        """Go to a state; None is that of a core that has seen nothing."""
        self.scheduler: Scheduler = self.setup.scheduler()
        blocks = self.setup.block_manager(RecordedBlocks)
        assert isinstance(blocks, RecordedBlocks)
        self.blocks = blocks
        self.blocks.keys = self._keys
        self.planned.clear()
        if state is not None:
            self._restore(state)

    def _restore(self, state: State) -> None:
        longest = self.setup.max_model_len + self.setup.max_draft_tokens
        try:
            for one in state.sequences:
                given = (one.request.num_prompt_tokens, one.tokens, one.unsent, one.drafts)
                if any(isinstance(tokens, int) and tokens > longest for tokens in given):
                    raise ValueError("a sequence is too long")
                self.requests[one.request.request_id] = one.request
            restore(state, self.scheduler, self.blocks, self.blocks.recorded_chain)
        except Exception as error:
            raise RecordError(f"the state that the record begins with is impossible ({_described(error)})") from error

    def state(self) -> State:
        return capture(self.scheduler, self.blocks, tokens=self.tokens)

    def apply(self, frame: Call) -> Commit | PlannedStep | None:
        """Make one call of the record again; return what came of a plan or a commit.

        Raises:
            RecordError: The call is impossible, or what came of it is not what the record says.
        """
        try:
            match frame:
                case Arrival():
                    if frame.request.num_prompt_tokens > self.setup.max_model_len:
                        raise ValueError("its prompt is too long")
                    self.requests[frame.request.request_id] = frame.request
                    self.scheduler.submit(frame.request.request_id, frame.request.submission())
                    return None
                case Leave():
                    self.scheduler.abort(frame.request_id)
                    return None
                case Planned():
                    return self._plan(frame)
                case Committed():
                    return self._commit(frame)
        except RecordError:
            raise
        except Exception as error:
            raise RecordError(f"the record does not fit together {_where(frame)} ({_described(error)})") from error

    def _plan(self, frame: Planned) -> PlannedStep:
        self._prepare_drafts(frame)
        ask = self.scheduler.ask(frame.prompt_tokens)
        if ask is None or ask.step != frame.step:
            raise RecordError(f"step {frame.step} of the record is not planned again: {DIFFERENT}")
        grant = self.blocks.reserve(ask)
        plan = self.scheduler.plan(grant)
        self.scheduler.take_ended()
        if crc32(decisions(grant, plan)) != frame.check:
            raise RecordError(f"step {frame.step} is planned differently from the record: {DIFFERENT}")
        self.planned[frame.step] = planned = PlannedStep(ask, grant, plan)
        return planned

    def _prepare_drafts(self, frame: Planned) -> None:
        """Let each sequence propose as many drafts as the record says, where proposals depend on its tokens."""
        if self.tokens or self.setup.lookup is None:
            return
        running = self.scheduler.running
        # The column is in the order of the ask: decodes, then prefills, then those that rest.
        decodes = [one for one in running if one.target - one.scheduled == 1]
        for at, sequence in enumerate(decodes):
            sequence.lookup = _RecordedDrafts(frame.drafts[at] if frame.drafts else 0)

    def _commit(self, frame: Committed) -> Commit:
        step = self.scheduler._in_flight[0]
        return self.scheduler.commit(self._result(frame, step))

    def _result(self, frame: Committed, step: RunningStep) -> StepResult:
        """Return a result that has the same consequences as the recorded one."""
        if max((*(frame.counts or ()), *(frame.num_drafts or ())), default=0) > self.setup.max_draft_tokens + 1:
            raise ValueError("more drafts than the engine makes")
        scored: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        for sequence, count in zip(step.rows, step.grant.counts, strict=True):
            if sequence.wants_prompt_logprobs:
                scored[sequence.request_id] = (None,) * count
        drafts = frame.drafts
        if drafts is None and frame.num_drafts is not None:
            drafts = tuple([(PLAIN,) * count for count in frame.num_drafts])
        return StepResult(
            frame.step,
            self._sampled(frame, step) if frame.token_ids is None else frame.token_ids,
            prompt_logprobs=scored,
            embeddings={sequence.request_id: () for sequence in step.rows if sequence.pooling},
            failed=frame.failed,
            seconds=frame.seconds,
            drafts=drafts,
        )

    def _sampled(self, frame: Committed, step: RunningStep) -> tuple[tuple[int, ...], ...]:
        rows: list[tuple[int, ...]] = []
        for at, (sequence, samples) in enumerate(zip(step.rows, step.samples, strict=True)):
            last = STOP if sequence.request_id in frame.stopped else PLAIN
            count = 1 if frame.counts is None else max(1, frame.counts[at])
            rows.append((PLAIN,) * (count - 1) + (last,) if samples and not sequence.pooling else ())
        return tuple(rows)


DIFFERENT = "another version of trio-llm wrote it, or the file was changed"


def _where(frame: Call) -> str:
    match frame:
        case Arrival():
            return f"where request {frame.request.request_id} arrives"
        case Leave():
            return f"where request {frame.request_id} leaves"
        case _:
            return f"at step {frame.step}"


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
