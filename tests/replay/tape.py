"""Records a core that is stepped by hand, and takes its state after every step to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from tests.core.loop import EOS, Loop
from trio_llm.core.setup import CoreSetup
from trio_llm.core.speculation import Speculation
from trio_llm.messages import BlockAsk, BlockGrant, Commit, StepPlan, StepResult
from trio_llm.params import Submission
from trio_llm.replay.encoder import Encoder, KeyEncoder
from trio_llm.replay.files import framed, write_head
from trio_llm.replay.frames import Frame, Header, Keys, decisions
from trio_llm.replay.state import State, capture


def setup_of(loop: Loop, *, policy: str = "fcfs", speculation: Speculation | None = None) -> CoreSetup:
    """Return the setup of a loop."""
    sizes = speculation and speculation.lookup
    return CoreSetup(
        max_num_batched_tokens=loop.budget,
        max_batch_size=loop.max_batch_size,
        max_model_len=loop.max_model_len,
        eos_token_ids=EOS,
        scheduling_policy=policy,
        long_prefill_token_threshold=loop.chunk,
        num_kv_blocks=len(loop.blocks.blocks()),
        groups=loop.groups,
        enable_prefix_caching=loop.blocks._caching,
        max_step_tokens=loop.blocks._max_step_tokens or 0,
        lookup=None if not sizes else (sizes.shortest, sizes.longest),
        max_draft_tokens=0 if speculation is None else speculation.max_drafts,
        steps_in_flight=loop.depth,
        target_step_s=None,
    )


class Tape:
    """Watches a loop's scheduler and block manager.

    Attributes:
        frames: What a record of the loop has.
        states: The state after each step's commit.
        begins: Step -> place in `frames` and state between two calls soon after it, for files that begin there.
    """

    def __init__(self, loop: Loop, setup: CoreSetup, *, tokens: bool) -> None:
        self.setup, self.tokens = setup, tokens
        self.frames: list[Frame] = []
        self.states: dict[int, State] = {}
        self.begins: dict[int, tuple[int, State]] = {}
        self.loop = loop
        self.encoder = Encoder(0.0, tokens=tokens, speculates=setup.max_draft_tokens > 0)
        self.keys = KeyEncoder({})
        self._clock = 0
        self._watch(loop.scheduler, loop.blocks)

    def header(self, state: State | None = None) -> Header:
        return Header("0", "hash", 0.0, self.tokens, self.setup, state)

    def save(self, path: Path, begin: int | None = None) -> Path:
        """Write the record, from its start or from where a step ends."""
        at, state = (0, None) if begin is None else self.begins[begin]
        keys = [frame for frame in self.frames[:at] if isinstance(frame, Keys)]
        with path.open("wb") as file:
            write_head(file)
            file.write(framed(self.header(state)))
            for frame in [*keys, *self.frames[at:]]:
                file.write(framed(frame))
        return path

    def _watch(self, scheduler: Any, blocks: Any) -> None:
        submit, abort, ask_, plan_, commit_ = (
            scheduler.submit, scheduler.abort, scheduler.ask, scheduler.plan, scheduler.commit,
        )  # fmt: skip
        reserve = blocks.reserve
        last: dict[str, Any] = {}

        def tick() -> float:
            self._clock += 1
            return self._clock / 1000

        def submitted(request_id: int, submission: Submission) -> None:
            submit(request_id, submission)
            self.frames.append(self.encoder.arrived(request_id, submission, tick()))

        def aborted(request_id: int) -> None:
            abort(request_id)
            self.frames.append(self.encoder.left(request_id, "abort", tick()))

        def asked(prompt_tokens: int | None = None) -> BlockAsk | None:
            last["prompt_tokens"], last["ask"] = prompt_tokens, ask_(prompt_tokens)
            return last["ask"]

        def reserved(ask: BlockAsk) -> BlockGrant:
            grant = reserve(ask)
            chains = {admit.request_id: blocks.chain(admit.request_id) for admit in ask.admits}
            last["chains"] = {request_id: chain for request_id, chain in chains.items() if chain is not None}
            return grant

        def planned(grant: BlockGrant) -> StepPlan | None:
            plan = plan_(grant)
            ask = last["ask"]
            columns = last["prompt_tokens"], ask.drafts, decisions(grant, plan)
            self.frames.append(self.encoder.planned(ask.step, tick(), *columns))
            self.frames.extend(self.keys.planned(ask.released, last["chains"]))
            self.frames.extend(self.keys.new())
            return plan

        def committed(result: StepResult) -> Commit:
            commit = commit_(result)
            result = attrs.evolve(result, seconds=0.002 + 0.0005 * commit.stats.num_tokens)
            self.frames.append(self.encoder.committed(tick(), result, commit))
            self.states[result.step] = capture(scheduler, blocks, tokens=self.tokens)
            self.begins[result.step] = len(self.frames), self.states[result.step]
            return commit

        scheduler.submit, scheduler.abort, scheduler.ask = submitted, aborted, asked
        scheduler.plan, scheduler.commit, blocks.reserve = planned, committed, reserved
