"""The whole core in a loop with the hash model, checking after every verb what must always be true."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import attrs

from tests.core.hash_model import HashRunner, chain_of, logprob_of, reference
from trio_llm.core.block_manager import BlockManager
from trio_llm.core.block_math import max_live_blocks
from trio_llm.core.block_view import BlockState
from trio_llm.core.prefix import Chain
from trio_llm.core.scheduler import Scheduler
from trio_llm.core.speculation import Speculation
from trio_llm.messages import (
    BlockAsk,
    BlockGrant,
    Embedding,
    Event,
    Failed,
    Finished,
    PromptLogprobs,
    Started,
    StepPlan,
    StepResult,
    StepStats,
    Tokens,
)
from trio_llm.model_info import KVGroup
from trio_llm.params import PoolingParams, SamplingParams, Submission

FULL = (KVGroup((0, 1), 4),)
SLIDING = (KVGroup((0, 1), 4, 6),)
HYBRID = (KVGroup((1,), 4), KVGroup((0, 2), 4, 5))
TWO_SIZES = (KVGroup((0, 1), 2, 7), KVGroup((2,), 8), KVGroup((3,), 4, 3))

EOS = (0, 3)
VOCAB = 53


@attrs.define
class Client:
    """What one request asked and what it heard."""

    prompt: tuple[int, ...]
    params: SamplingParams | PoolingParams
    salt: bytes
    events: list[Event] = attrs.field(factory=list)
    aborted: bool = False
    hit: int | None = None

    @property
    def output(self) -> list[int]:
        return [token for event in self.events if isinstance(event, Tokens) for token in event.token_ids]

    @property
    def ended(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished | Failed)


class Loop:
    """Scheduler, block manager and hash model, stepped by hand.

    Args:
        depth: Steps in flight; each is committed when the one after it was planned.
        late: The model runs a plan only when its result is waited for: everything that the core does meanwhile comes
            before it.
        speculation: As the scheduler's.
        guess: What a draft model says where this token is right.
        prompt_tokens: Returns what each ask is limited to.
    """

    def __init__(
        self,
        groups: tuple[KVGroup, ...] = FULL,
        *,
        num_blocks: int = 64,
        budget: int = 16,
        max_batch_size: int = 8,
        max_model_len: int = 64,
        caching: bool = True,
        policy: str = "fcfs",
        threshold: int = 0,
        eos: Sequence[int] = EOS,
        depth: int = 1,
        late: bool = False,
        speculation: Speculation | None = None,
        guess: Callable[[int], int] = lambda token: token,
        prompt_tokens: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        chunk = min(threshold or budget, budget)
        self.blocks = BlockManager(
            num_blocks=num_blocks,
            groups=groups,
            enable_prefix_caching=caching,
            secret=b"key",
            max_step_tokens=chunk * depth,
        )
        self.max_model_len = min(max_model_len, self.blocks.max_tokens())
        self.scheduler = Scheduler(
            max_num_batched_tokens=budget,
            max_batch_size=max_batch_size,
            max_model_len=self.max_model_len,
            eos_token_ids=eos,
            policy=policy,
            long_prefill_token_threshold=threshold,
            speculation=speculation,
        )
        most = speculation.max_drafts if speculation else 0
        # The newest token, its drafts, and those that a draft model goes on to from there.
        self.ahead = 2 * most + 1
        self.groups, self.budget, self.max_batch_size, self.eos, self.chunk = groups, budget, max_batch_size, eos, chunk
        self.depth = depth
        self.busy = False  # whether a step may find something to run or to release
        self.in_flight = deque[tuple[StepPlan, Callable[[], StepResult]]]()
        self.clients: dict[int, Client] = {}
        self.salts: dict[int, bytes] = {}
        self.runner = HashRunner(groups, num_blocks, VOCAB, self.salts, late=late, most=most, guess=guess)
        self.runner.on_write = self._check_write
        self.plans: list[StepPlan] = []
        self.grants: list[BlockGrant] = []
        self.stats: list[StepStats] = []
        self.returned: list[int] = []
        self._meanings: dict[bytes, int] = {}
        self._digests: dict[tuple[bytes, tuple[int, ...]], bytes] = {}

    # --- what a user of the core does -----------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | PoolingParams | None = None,
        *,
        salt: bytes = b"",
        priority: int = 0,
        leader: int | None = None,
    ) -> int:
        """Submit a request and return its id."""
        self.busy = True
        request_id = len(self.clients) + 1
        params = params or SamplingParams(max_tokens=4)
        self.scheduler.submit(request_id, Submission(prompt, params, priority=priority, salt=salt, leader=leader))
        self.clients[request_id] = Client(tuple(prompt), params, salt)
        self.salts[request_id] = salt
        return request_id

    def abort(self, request_id: int) -> None:
        self.scheduler.abort(request_id)
        self.clients[request_id].aborted = not self.clients[request_id].ended

    def step(
        self,
        failed: Sequence[int] = (),
        *,
        before_plan: Callable[[], None] | None = None,
        in_flight: Callable[[], None] | None = None,
    ) -> StepPlan | None:
        """Plan a step and commit the oldest one, unless there is room for another or nothing was planned.

        The callbacks run between ask and plan, and before the commit. Return what was planned.
        """
        plan = self._launch(failed, before_plan)
        if self.in_flight and (plan is None or len(self.in_flight) == self.depth):
            if in_flight:
                in_flight()
            self._commit(*self.in_flight.popleft())
        return plan

    def _launch(self, failed: Sequence[int], before_plan: Callable[[], None] | None) -> StepPlan | None:
        wanting = self.scheduler.num_running + len(self.scheduler.waiting)
        ask = self.scheduler.ask(self.prompt_tokens())
        self.busy = ask is not None or bool(self.in_flight)
        if ask is None:
            assert self.in_flight or not wanting, "there is work and nobody asks"
            return None
        self._check_ask(ask)
        grant = self.blocks.reserve(ask)
        self._check_grant(ask, grant)
        self.check_blocks()
        assert grant.request_ids or self.in_flight or not wanting, "there is work and nothing advances"
        if before_plan:
            before_plan()
        plan = self.scheduler.plan(grant)
        self.returned += self.scheduler.take_ended()
        if plan is None:
            return None
        self.plans.append(plan)
        self._check_writes(plan)
        self.in_flight.append((plan, self.runner.launch(plan, failed)))
        return plan

    def _commit(self, plan: StepPlan, wait: Callable[[], StepResult]) -> None:
        commit = self.scheduler.commit(wait())
        for request_id, event in commit.events:
            self._hear(request_id, event)
        self._check_stats(plan, commit.stats)

    def run(self, max_steps: int = 3000) -> None:
        """Step until nothing is left to do, then check that nothing is left behind."""
        for _ in range(max_steps):
            self.step()
            if not self.busy:
                self.check_drained()
                return
        raise AssertionError("it does not come to an end")

    def shares(self) -> dict[int, int]:
        """Return how many tokens each row of the last plan computed."""
        return dict(zip(self.plans[-1].request_ids, self.plans[-1].counts, strict=True))

    # --- what must be true ----------------------------------------------------------------------------------------

    def _check_ask(self, ask: BlockAsk) -> None:
        assert len(ask.request_ids) <= self.max_batch_size
        assert sorted(ask.request_ids) == sorted(ask.preempt_order)
        for sequence in self.scheduler.running:
            known = len(sequence.tokens)
            assert sequence.computed < known <= self.max_model_len
            assert sequence.computed <= sequence.scheduled <= sequence.target <= min(known + 1, self.max_model_len)
            assert self.in_flight or (sequence.computed, sequence.target) == (sequence.scheduled, known)
            assert not sequence.drafts or known + len(sequence.drafts) < sequence.stop.max_len, (
                "a draft for which there is no room"
            )
        assert all(sequence.computed == sequence.scheduled == 0 for sequence in self.scheduler.waiting)

    def _check_grant(self, ask: BlockAsk, grant: BlockGrant) -> None:
        self.grants.append(grant)
        rows = grant.request_ids
        assert sum(grant.counts) <= self.budget
        assert all(0 < count <= self.chunk for count in grant.counts)
        assert not set(rows) & set(grant.preempted)
        assert not (grant.preempted and grant.num_admitted), "admitted in a step that preempted"
        running, admitted = rows[: len(rows) - grant.num_admitted], rows[len(rows) - grant.num_admitted :]
        assert admitted == ask.waiting[: len(admitted)], "somebody was overtaken"
        assert len(ask.request_ids) + len(admitted) <= self.max_batch_size
        kept = [request_id for request_id in ask.request_ids if request_id not in grant.preempted]
        assert list(running) == kept[: len(running)]
        if grant.preempted:
            assert grant.preempted == tuple(reversed(ask.preempt_order))[: len(grant.preempted)]
        for request_id, start in zip(admitted, grant.starts[len(running) :], strict=True):
            client = self.clients[request_id]
            if client.hit is None:
                client.hit = start
            assert start < len(self.scheduler_tokens(request_id))
        if sum(grant.drafts):
            self._check_drafts(ask, grant)

    def _check_drafts(self, ask: BlockAsk, grant: BlockGrant) -> None:
        """Check that drafts took what was left: nobody else's share of the step is cut."""
        ends = dict(zip(ask.request_ids, ask.ends, strict=True))
        for request_id, start, count, drafts in zip(
            grant.request_ids, grant.starts, grant.counts, grant.drafts, strict=True
        ):
            full = start + self.chunk if request_id in ask.waiting else ends[request_id]
            assert start + count - drafts in (full, len(self.scheduler_tokens(request_id)))
            assert not (drafts and request_id in ask.waiting), "drafts of a sequence that starts, or starts over"
        resting = {row for row, start in zip(ask.request_ids, ask.starts, strict=True) if start == ends[row]}
        assert set(ask.request_ids) <= resting | set(grant.request_ids) | set(grant.preempted)

    def scheduler_tokens(self, request_id: int) -> list[int]:
        client = self.clients[request_id]
        return list(client.prompt) + client.output

    def check_blocks(self) -> None:
        """Check the pool: every block is in one state, owned as often as counted, and holds what its key says."""
        states = self.blocks.blocks()
        assert states[0].state == "null"
        assert not states[0].owners
        assert states[0].references == 0, "the null block is counted"
        ranks = sorted(state.eviction_rank for state in states if state.eviction_rank is not None)
        assert ranks == list(range(len(ranks)))
        used = [0] * len(self.groups)
        for state in states[1:]:
            assert state.references == len(state.owners)
            assert (state.state == "used") == bool(state.owners) == (state.eviction_rank is None)
            assert len({group for _, group, _ in state.owners}) <= 1, "a block of two groups"
            if state.owners:
                used[state.owners[0][1]] += 1
            if state.state == "empty":
                self.runner.poison(state.block)
            if state.digest is not None:
                self._check_meaning(state)
        stats = self.grants[-1].stats
        assert stats.used_blocks == tuple(used)
        assert stats.cached_blocks == sum(state.state == "cached" for state in states)
        assert stats.total_blocks == len(states) - 1
        self._check_live(states)

    def _check_live(self, states: Sequence[BlockState]) -> None:
        owned: dict[tuple[int, int], int] = {}
        for state in states:
            for request_id, group, _ in state.owners:
                client = self.clients[request_id]
                assert not client.aborted, "blocks outlive their request"
                assert not client.ended, "blocks outlive their request"
                owned[request_id, group] = owned.get((request_id, group), 0) + 1
        for (request_id, group), count in owned.items():
            length = len(self.scheduler_tokens(request_id))
            most = max_live_blocks(length + self.depth - 1, self.groups[group], self.chunk * self.depth)
            if self.ahead > 1:
                most = max_live_blocks(length + self.ahead, self.groups[group], self.chunk * self.depth + self.ahead)
            assert count <= most

    def _check_meaning(self, state: BlockState) -> None:
        """Check that a key of the prefix cache stands for one sequence of tokens, all of them computed: its owners'."""
        slots, digest = self.runner.slots[state.block], state.digest
        filled = [slot for slot in slots if slot is not None]
        sizes = {group.block_size for group in self.groups}
        assert len(filled) in sizes, "a block can be hit before all of it is computed"
        chain = filled[-1][2]
        assert self._meanings.setdefault(digest, chain) == chain, "one key, two contents"
        for request_id, group, at in state.owners:
            size = self.groups[group].block_size
            tokens = tuple(self.scheduler_tokens(request_id)[: (at + 1) * size])
            assert digest == self._digest(self.salts[request_id], tokens), "a key for other tokens than the owner's"

    def _digest(self, salt: bytes, tokens: tuple[int, ...]) -> bytes:
        if (salt, tokens) not in self._digests:
            chunk = min(group.block_size for group in self.groups)
            chain = Chain(b"key", salt, tokens, chunk)
            self._digests[salt, tokens] = chain.block(len(tokens) // chunk - 1, chunk)[0]
        return self._digests[salt, tokens]

    def _check_write(self, block: int) -> None:
        assert self.blocks._pool.digest(block) is None, "written although prompts can hit it"

    def _check_writes(self, plan: StepPlan) -> None:
        states = self.blocks.blocks()
        for request_id, start, count in zip(plan.request_ids, plan.starts, plan.counts, strict=True):
            for group, table in zip(self.groups, self.blocks.tables(request_id), strict=True):
                size = group.block_size
                for index in range(start // size, (start + count - 1) // size + 1):
                    assert len(states[table[index]].owners) == 1, "written while somebody else reads it"
                    assert states[table[index]].digest is None

    def _check_stats(self, plan: StepPlan, stats: StepStats) -> None:
        self.stats.append(stats)
        assert stats.num_tokens == sum(plan.counts)
        assert stats.num_rows == len(plan.request_ids)
        assert sum(stats.accepted) <= sum(stats.drafted) <= sum(plan.drafts)
        assert stats.num_running == self.scheduler.num_running
        assert stats.num_waiting == self.scheduler.num_waiting

    def _hear(self, request_id: int, event: Event) -> None:
        client = self.clients[request_id]
        assert not client.aborted, "a client that left is told something"
        assert not client.ended, "told something after the end"
        assert isinstance(event, Started) == (not client.events)
        client.events.append(event)
        if client.ended:
            self.check_output(request_id)

    def check_output(self, request_id: int) -> None:
        """Check everything that an ended request heard against the truth."""
        client = self.clients[request_id]
        last = client.events[-1]
        if isinstance(last, Failed):
            return
        assert isinstance(last, Finished)
        assert isinstance(client.events[0], Started)
        assert client.events[0].cached_tokens == client.hit == last.usage.cached_tokens
        assert last.usage.prompt_tokens == len(client.prompt)
        assert last.usage.completion_tokens == len(client.output)
        if isinstance(client.params, PoolingParams):
            kinds = [type(event) for event in client.events]
            assert kinds == [Started, Embedding, Finished]
            return
        expected = reference(client.prompt, client.params, self.groups, VOCAB, self.eos, self.max_model_len)
        assert client.output == expected
        assert last.reason == ("stop" if self._stops(client, expected) else "length")
        scored = [event for event in client.events if isinstance(event, PromptLogprobs)]
        assert len(scored) == (client.params.prompt_logprobs is not None)
        if scored:
            assert client.events[1] is scored[0]
            assert list(scored[0].entries) == [logprob_of(client.prompt, at) for at in range(len(client.prompt))]

    def _stops(self, client: Client, output: list[int]) -> bool:
        params = client.params
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.eos))
        return output[-1] in stops and len(output) >= params.min_tokens

    def check_drained(self) -> None:
        """Check that nothing is left of the requests that ended."""
        assert not self.busy
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert all(state.state != "used" for state in self.blocks.blocks())
        assert "0 sequences" in repr(self.blocks)
        assert self.blocks._reserved_blocks == 0
        assert all(client.ended or client.aborted for client in self.clients.values())
        assert sorted(self.returned) == sorted(self.clients), "a ticket is lost or returned twice"


def prompt_of(length: int, seed: int = 1) -> tuple[int, ...]:
    """Return a prompt; the same seed gives prompts that begin alike."""
    return tuple(chain_of((seed, at)) % VOCAB for at in range(length))
