"""An exact stand-in for a model: integers instead of floats, so that any wrong block changes the output.

A slot of the KV cache holds the position, the token and a hash of everything up to it. The next token is a hash of
what is read back through the block tables of the plan, which it checks slot by slot: a wrong block, a stale byte, a
wrong window or position, another tenant's prefix, or a slot read before it was written fails at once.

Like a device it does what it is given in order, and if it is told to be late only when somebody waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import attrs

from trio_llm.messages import UNKNOWN, StepPlan, StepResult, TokenLogprobs
from trio_llm.model_info import KVGroup
from trio_llm.params import PoolingParams, SamplingParams

MODULUS = (1 << 61) - 1

Slots = list[list[tuple[int, int, int] | None]]


def absorb(chain: int, token: int) -> int:
    """Return the hash of a sequence that is longer by one token."""
    return (chain * 1_000_003 + token + 1) % MODULUS


def chain_of(tokens: Sequence[int], salt: bytes = b"") -> int:
    """Return the hash of a whole sequence; different tenants never agree."""
    chain = int.from_bytes(salt, "big") + 7
    for token in tokens:
        chain = absorb(chain, token)
    return chain


def next_token(tokens: Sequence[int], groups: Sequence[KVGroup], vocab_size: int) -> int:
    """Return what a model with these groups says after `tokens`: each group adds a hash of what it sees."""
    total = 0
    for group in groups:
        seen = tokens if group.window is None else tokens[-group.window :]
        total += chain_of(seen) * (len(group.layers) + 1)
    return total % MODULUS % vocab_size


def reference(
    prompt: Sequence[int],
    params: SamplingParams,
    groups: Sequence[KVGroup],
    vocab_size: int,
    eos: Sequence[int],
    max_model_len: int,
) -> list[int]:
    """Return the output of a request that has the machine to itself: no cache, no chunks, no batch."""
    tokens = list(prompt)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    while True:
        tokens.append(next_token(tokens, groups, vocab_size))
        produced = len(tokens) - len(prompt)
        if tokens[-1] in stops and produced >= params.min_tokens:
            break
        if produced == params.max_tokens or len(tokens) == max_model_len:
            break
    return tokens[len(prompt) :]


@attrs.define
class _Known:
    tokens: list[int]
    num_prompt: int
    params: SamplingParams | PoolingParams
    salt: bytes
    tables: list[list[int]]


class HashRunner:
    """Runs plans as a real runner would, out of one pool of slots.

    Args:
        salts: request_id -> salt, which a real runner never hears of; here it proves that tenants never share.
        late: Run a plan only when its result is waited for, instead of at once.
        most: Drafts that its draft model makes at a time, out of KV of its own in slots of the same places.
        guess: What the draft model says where this token is right.

    Attributes:
        on_write: Called with each block that a row writes, when it does.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_blocks: int,
        vocab_size: int,
        salts: dict[int, bytes],
        *,
        late: bool = False,
        most: int = 0,
        guess: Callable[[int], int] = lambda token: token,
    ) -> None:
        self.groups = groups
        self.vocab_size = vocab_size
        self.salts = salts
        size = max(group.block_size for group in groups)
        self.slots: Slots = [[None] * size for _ in range(num_blocks)]
        self.draft_slots = [list(slots) for slots in self.slots]
        self.known: dict[int, _Known] = {}
        self.on_write: Callable[[int], None] = lambda block: None
        self._late, self._most, self._guess = late, most, guess
        self._queue = deque[Callable[[], object]]()
        # What the last two steps sampled, as a runner keeps it on its device; the plan's step says when to turn over.
        self._step = 0
        self._sampled: dict[int, int] = {}
        self._sampled_before: dict[int, int] = {}

    def poison(self, block: int) -> None:
        """Make a block unreadable, after all that was launched so far."""
        self._enqueue(partial(self._poison, block))

    def _poison(self, block: int) -> None:
        self.slots[block] = [None] * len(self.slots[block])
        self.draft_slots[block] = [None] * len(self.slots[block])

    def _enqueue(self, work: Callable[[], object]) -> None:
        self._queue.append(work)
        if not self._late:
            self._run_queue()

    def _run_queue(self, end: list[StepResult] | None = None) -> None:
        """Run what was launched, all of it or until there is a result."""
        while self._queue and not end:
            self._queue.popleft()()

    def chain_at_end(self, block: int, group: int) -> int | None:
        """Return the hash of all tokens up to a block's end, None if some slot of it holds nothing."""
        slots = self.slots[block][: self.groups[group].block_size]
        return None if any(slot is None for slot in slots) else slots[-1][2]

    def launch(self, plan: StepPlan, failed: Sequence[int] = ()) -> Callable[[], StepResult]:
        """Queue a plan; return what waits for its result."""
        result: list[StepResult] = []

        def wait() -> StepResult:
            self._run_queue(result)
            return result[0]

        self._enqueue(lambda: result.append(self._run(plan, failed)))
        return wait

    def step(self, plan: StepPlan, failed: Sequence[int] = ()) -> StepResult:
        """Apply a plan and run its rows; those in `failed` yield an error."""
        return self.launch(plan, failed)()

    def _run(self, plan: StepPlan, failed: Sequence[int]) -> StepResult:
        if plan.step != self._step:
            self._step, self._sampled_before, self._sampled = plan.step, self._sampled, {}
        self._learn(plan)
        results: list[tuple[int, ...]] = []
        prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        embeddings: dict[int, tuple[float, ...]] = {}
        proposed: list[tuple[int, ...]] = []
        at = 0
        num_drafts = plan.drafts or (0,) * len(plan.counts)
        columns = zip(plan.request_ids, plan.starts, plan.counts, num_drafts, strict=True)
        for row, (request_id, start, total, num) in enumerate(columns):
            known, count = self.known[request_id], total - num
            tokens, drafts = plan.token_ids[at : at + count], plan.token_ids[at + count : at + total]
            at += total
            if UNKNOWN in tokens:
                tokens = self._look_up(request_id, known, start, tokens)
            assert tuple(known.tokens[start : start + count]) == tokens, "the plan feeds other tokens than were known"
            assert plan.samples[row] == (start + count == len(known.tokens))
            sampled = self._run_row(known, start, tokens)
            kept = (sampled, *self._verify(known, sampled, drafts))
            if plan.draft_limits:
                ahead = kept if plan.samples[row] and not isinstance(known.params, PoolingParams) else ()
                proposed.append(self._propose(known, start, start + count, ahead, plan.draft_limits[row]))
            if request_id in failed:
                results.append(())
                continue
            if isinstance(known.params, SamplingParams) and known.params.prompt_logprobs is not None:
                entries = [logprob_of(known.tokens, at) for at in range(start, min(start + count, known.num_prompt))]
                prompt_logprobs[request_id] = tuple(entries)
            if not plan.samples[row]:
                results.append(())
            elif isinstance(known.params, PoolingParams):
                embeddings[request_id] = (float(sampled),)
                results.append(())
            else:
                known.tokens += kept
                self._sampled[request_id] = sampled
                results.append(kept)
        assert at == len(plan.token_ids)
        errors = {request_id: "made to fail" for request_id in failed if request_id in plan.request_ids}
        return StepResult(
            plan.step,
            tuple(results),
            prompt_logprobs=prompt_logprobs or None,
            embeddings=embeddings or None,
            failed=errors,
            drafts=tuple(proposed) if plan.draft_limits else None,
        )

    def _verify(self, known: _Known, sampled: int, drafts: Sequence[int]) -> list[int]:
        """Run all drafts, write their KV, and return what is sampled after those that are right."""
        before, right, kept = len(known.tokens), sampled, list[int]()
        for draft in drafts:
            known.tokens.append(draft)
            newest = self._run_row(known, len(known.tokens) - 1, (draft,))
            if draft == right and len(kept) == len(known.tokens) - before - 1:
                kept.append(newest)
                right = newest
        del known.tokens[before:]
        return kept

    def _propose(self, known: _Known, start: int, end: int, kept: Sequence[int], reach: int) -> tuple[int, ...]:
        """Compute with the draft model what the row computed and keeps, and guess on up to where there is room."""
        before, drafts = len(known.tokens), list[int]()
        known.tokens += kept[:-1]
        self._run_row(known, start, known.tokens[start : end + max(0, len(kept) - 1)], self.draft_slots)
        known.tokens += kept[-1:]
        while kept and len(drafts) < self._most and len(known.tokens) <= reach:
            self._run_row(known, len(known.tokens) - 1, known.tokens[-1:], self.draft_slots)
            drafts.append(self._guess(next_token(known.tokens, self.groups, self.vocab_size)))
            known.tokens += drafts[-1:]
        del known.tokens[before:]
        return tuple(drafts)

    def _look_up(self, request_id: int, known: _Known, start: int, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Return the token that the step before sampled, or any where it sampled none: the row failed in it."""
        assert tokens == (UNKNOWN,), "more is unknown than one token"
        token = self._sampled_before.get(request_id, 0)
        if start == len(known.tokens):
            known.tokens.append(token)
        return (token,)

    def _learn(self, plan: StepPlan) -> None:
        for request_id in plan.dropped:
            del self.known[request_id]
        for admission in plan.admitted:
            assert admission.request_id not in self.known
            self.known[admission.request_id] = _Known(
                list(admission.token_ids),
                admission.num_prompt_tokens,
                admission.params,
                self.salts[admission.request_id],
                [[] for _ in self.groups],
            )
        assert len(set(plan.request_ids)) == len(plan.request_ids), "two rows of one sequence"
        for request_id, start, new in zip(plan.request_ids, plan.starts, plan.new_blocks, strict=True):
            for group, (at, blocks) in enumerate(new):
                table = self.known[request_id].tables[group]
                assert at <= len(table), "a hole in the block table"
                table[at:] = blocks
                for index in range(at, len(table)):
                    if index * self.groups[group].block_size >= start:
                        self._poison(table[index])

    def _run_row(self, known: _Known, start: int, tokens: Sequence[int], into: Slots | None = None) -> int:
        """Write the row's KV, then read back all that its last query sees, and hash it."""
        slots = self.slots if into is None else into
        chain = chain_of(known.tokens[:start], known.salt)
        for position, token in enumerate(tokens, start=start):
            chain = absorb(chain, token)
            for group, table in zip(self.groups, known.tables, strict=True):
                block = table[position // group.block_size]
                assert block != 0, "the null block is written"
                self.on_write(block)
                slots[block][position % group.block_size] = (position, token, chain)
        end = start + len(tokens)
        total = 0
        for group, table in zip(self.groups, known.tables, strict=True):
            # The row's first query sees furthest back; the last one decides the output.
            oldest = 0 if group.window is None else max(0, start - group.window + 1)
            self._check(known, group, table, oldest, end, slots)
            first = 0 if group.window is None else max(0, end - group.window)
            seen = [self._slot(group, table, at, slots)[1] for at in range(first, end)]
            total += chain_of(seen) * (len(group.layers) + 1)
        return total % MODULUS % self.vocab_size

    def _check(self, known: _Known, group: KVGroup, table: list[int], first: int, end: int, slots: Slots) -> None:
        chain = chain_of(known.tokens[:first], known.salt)
        for position in range(first, end):
            chain = absorb(chain, known.tokens[position])
            expected = (position, known.tokens[position], chain)
            slot = self._slot(group, table, position, slots)
            assert slot == expected, f"slot {position} of a group with window {group.window} holds {slot}"

    def _slot(self, group: KVGroup, table: list[int], position: int, slots: Slots) -> tuple[int, int, int]:
        block = table[position // group.block_size]
        assert block != 0, "the null block is read"
        slot = slots[block][position % group.block_size]
        assert slot is not None, f"position {position} is read before it was written"
        return slot


def logprob_of(tokens: Sequence[int], position: int) -> TokenLogprobs | None:
    """Return a log-probability that depends on everything up to the position."""
    if position == 0:
        return None
    return TokenLogprobs(tokens[position], -float(chain_of(tokens[: position + 1]) % 1000), 1, ())
