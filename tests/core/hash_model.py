"""An exact stand-in for a model: integers instead of floats, so that any wrong block changes the output.

A slot of the KV cache holds the position, the token and a hash of everything up to it. The next token is a hash of
what is read back through the block tables of the plan, which it checks slot by slot: a wrong block, a stale byte, a
wrong window or position, another tenant's prefix, or a slot read before it was written fails at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from trio_llm.messages import (
    KVGroup,
    PoolingParams,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

MODULUS = (1 << 61) - 1


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
    """

    def __init__(self, groups: Sequence[KVGroup], num_blocks: int, vocab_size: int, salts: dict[int, bytes]) -> None:
        self.groups = groups
        self.vocab_size = vocab_size
        self.salts = salts
        size = max(group.block_size for group in groups)
        self.slots: list[list[tuple[int, int, int] | None]] = [[None] * size for _ in range(num_blocks)]
        self.known: dict[int, _Known] = {}
        self.poisoned = 0

    def poison(self, block: int) -> None:
        """Make a block unreadable."""
        self.slots[block] = [None] * len(self.slots[block])
        self.poisoned += 1

    def chain_at_end(self, block: int, group: int) -> int | None:
        """Return the hash of all tokens up to a block's end, None if some slot of it holds nothing."""
        slots = self.slots[block][: self.groups[group].block_size]
        return None if any(slot is None for slot in slots) else slots[-1][2]

    def step(self, plan: StepPlan, failed: Sequence[int] = ()) -> StepResult:
        """Apply a plan and run its rows; those in `failed` yield an error."""
        self._learn(plan)
        results: list[tuple[int, ...]] = []
        prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        embeddings: dict[int, tuple[float, ...]] = {}
        at = 0
        for row, (request_id, start, count) in enumerate(zip(plan.request_ids, plan.starts, plan.counts, strict=True)):
            known = self.known[request_id]
            tokens = plan.token_ids[at : at + count]
            at += count
            assert tuple(known.tokens[start : start + count]) == tokens, "the plan feeds other tokens than were known"
            assert plan.samples[row] == (start + count == len(known.tokens))
            sampled = self._run_row(known, start, tokens)
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
                known.tokens.append(sampled)
                results.append((sampled,))
        assert at == len(plan.token_ids)
        errors = {request_id: "made to fail" for request_id in failed if request_id in plan.request_ids}
        return StepResult(
            plan.step,
            tuple(results),
            prompt_logprobs=prompt_logprobs or None,
            embeddings=embeddings or None,
            failed=errors,
        )

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
                        self.poison(table[index])

    def _run_row(self, known: _Known, start: int, tokens: Sequence[int]) -> int:
        """Write the row's KV, then read back all that its last query sees, and hash it."""
        chain = chain_of(known.tokens[:start], known.salt)
        for position, token in enumerate(tokens, start=start):
            chain = absorb(chain, token)
            for group, table in zip(self.groups, known.tables, strict=True):
                block = table[position // group.block_size]
                assert block != 0, "the null block is written"
                self.slots[block][position % group.block_size] = (position, token, chain)
        end = start + len(tokens)
        total = 0
        for group, table in zip(self.groups, known.tables, strict=True):
            # The row's first query sees furthest back; the last one decides the output.
            oldest = 0 if group.window is None else max(0, start - group.window + 1)
            self._check(known, group, table, oldest, end)
            first = 0 if group.window is None else max(0, end - group.window)
            seen = [self._slot(group, table, at)[1] for at in range(first, end)]
            total += chain_of(seen) * (len(group.layers) + 1)
        return total % MODULUS % self.vocab_size

    def _check(self, known: _Known, group: KVGroup, table: list[int], first: int, end: int) -> None:
        chain = chain_of(known.tokens[:first], known.salt)
        for position in range(first, end):
            chain = absorb(chain, known.tokens[position])
            expected = (position, known.tokens[position], chain)
            slot = self._slot(group, table, position)
            assert slot == expected, f"slot {position} of a group with window {group.window} holds {slot}"

    def _slot(self, group: KVGroup, table: list[int], position: int) -> tuple[int, int, int]:
        block = table[position // group.block_size]
        assert block != 0, "the null block is read"
        slot = self.slots[block][position % group.block_size]
        assert slot is not None, f"position {position} is read before it was written"
        return slot


def logprob_of(tokens: Sequence[int], position: int) -> TokenLogprobs | None:
    """Return a log-probability that depends on everything up to the position."""
    if position == 0:
        return None
    return TokenLogprobs(tokens[position], -float(chain_of(tokens[: position + 1]) % 1000), 1, ())
