"""The messages between clients, actors, the pure core and the runner (floor 0).

Terms: request (HTTP, handle), sequence (core), row (in a step), block, step, plan, result. Messages of every step hold
columns (tuples of equal length), not one object per row: a frozen object per row costs ten times as much at 256 rows.
Prompts are sent once, at admission. Block tables are sent as additions.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat
from typing import Literal

import attrs

from trio_llm.params import PoolingParams, SamplingParams

FinishReason = Literal["stop", "length", "repetition", "abort"]

UNKNOWN = -1
"""In a StepPlan, the token that the previous step samples for the same sequence."""

# --- scheduler -> KV manager, once a step ------------------------------------------------------------------------


@attrs.frozen
class Admit:
    """Introduces a sequence to the KV manager, before it first waits for blocks. Its tokens are sent only here.

    Attributes:
        salt: Only sequences with the same salt share blocks.
        read_cache: False if every position must be computed (prompt logprobs, pooling).
    """

    request_id: int
    token_ids: tuple[int, ...]
    salt: bytes = b""
    read_cache: bool = True


@attrs.frozen
class BlockAsk:
    """What a step needs from the KV manager. Handled in this order: released, admits, running rows, waiting.

    Steps run one after the other, in the order of their plans. So a block may get a new owner although a planned step
    still reads or writes it for the old one: the step of the new owner runs later.

    Attributes:
        released: Sequences that ended; the manager forgets them.
        released_computed: Per released sequence, tokens whose KV is computed and committed; -1 if it failed, so that
            its blocks must not be shared.
        request_ids: Every running sequence, in scheduling order.
        computed: Per running row, tokens whose KV is computed and committed, without the steps in flight.
        starts: Per running row, its next position; the steps in flight compute what is before it.
        ends: Per running row, the position up to which it would compute in this step; the budget may reduce it. If it
            equals the start, the sequence has no row in this step.
        new_token_ids: Per running row, tokens sampled since the last ask.
        preempt_order: The same sequences in policy order; when blocks run out, the last one is preempted first.
        waiting: Candidates in policy order. The first one that does not get its blocks stops admission.
        token_budget: Maximum tokens of the step, over all rows.
        max_row_tokens: Maximum tokens of one row; at most the budget.
        drafts: Per running row, then per waiting one, the number of drafts to compute after its last known token, from
            the budget that all rows leave. Empty without speculative decoding, like `draft_ends`.
        draft_ends: Per row, the last position to allocate for drafts, including those that a draft model proposes next.
            From spare blocks only, and only if the row computes its last known token.
    """

    step: int
    released: tuple[int, ...]
    released_computed: tuple[int, ...]
    admits: tuple[Admit, ...]
    request_ids: tuple[int, ...]
    computed: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    new_token_ids: tuple[tuple[int, ...], ...]
    preempt_order: tuple[int, ...]
    waiting: tuple[int, ...]
    token_budget: int
    max_row_tokens: int
    drafts: tuple[int, ...] = ()
    draft_ends: tuple[int, ...] = ()


# --- KV manager -> scheduler -------------------------------------------------------------------------------------


@attrs.frozen
class BlockStats:
    """The pool after the blocks of a step were allocated.

    Attributes:
        total_blocks: Blocks that can hold tokens, without the null block.
        used_blocks: Per KV group, blocks that a sequence owns.
        cached_blocks: Free blocks that a prompt may still hit.
        queried_tokens, hit_tokens: Prompt tokens looked up and found, of sequences first admitted in this step.
    """

    total_blocks: int
    used_blocks: tuple[int, ...]
    cached_blocks: int
    queried_tokens: int
    hit_tokens: int


@attrs.frozen
class BlockGrant:
    """The rows that got their blocks, running ones first. Columns have one entry per row.

    Attributes:
        num_admitted: Number of rows at the end that were waiting; their `starts` are their prefix hits.
        new_blocks: As in StepPlan.
        preempted: Sequences that lost all their blocks, in order; none of them has a row.
        drafts: Number of the row's last tokens that are drafts. Empty without speculative decoding.
        capacities: Number of tokens for which the sequence has slots. Empty without speculative decoding.
    """

    step: int
    request_ids: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    new_blocks: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
    num_admitted: int
    preempted: tuple[int, ...]
    stats: BlockStats
    drafts: tuple[int, ...] = ()
    capacities: tuple[int, ...] = ()


# --- scheduler -> runner, once a step ----------------------------------------------------------------------------


@attrs.frozen
class Admission:
    """What the runner needs to know about a sequence before its first row.

    `token_ids` is the prompt and, after a preemption, the output so far. The first `num_prompt_tokens` are the prompt.
    """

    request_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    params: SamplingParams | PoolingParams


@attrs.frozen
class StepPlan:
    """One forward pass over a ragged batch. Columns have one entry per row unless stated otherwise.

    Applied in this order: `dropped` (sequences to forget), `admitted` (new sequences), `new_blocks`, then the rows.
    Applying a plan twice has the same effect as once, because a failed step is retried in halves.

    Attributes:
        request_ids: The rows, in batch order; at most one row per sequence.
        starts: Position of the row's first token. Everything before it is in the KV cache after the steps planned
            earlier.
        counts: Number of tokens that the row computes.
        token_ids: Flattened over the rows, sum(counts) long. A row of one token may be UNKNOWN. Its result is
            meaningless if the previous step sampled nothing for it, or its last token.
        samples: Whether the row's last token is the last one of its sequence, so that a token is sampled after it. For
            a pooling row, whether its embedding is complete.
        new_blocks: Per row and KV group: (index in the block table, block ids from there on). An empty tuple if a row
            has none. Block 0 is the null block, which is never written or read.
        drafts: Number of the row's last tokens that are drafts. A token is sampled after each of them and after the
            token before them. Empty without speculative decoding.
        draft_limits: Position before which a draft model may compute, within the blocks of the sequence; 0 for no
            drafts. Empty without a draft model.
    """

    step: int
    dropped: tuple[int, ...]
    admitted: tuple[Admission, ...]
    request_ids: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    token_ids: tuple[int, ...]
    samples: tuple[bool, ...]
    new_blocks: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
    drafts: tuple[int, ...] = ()
    draft_limits: tuple[int, ...] = ()


# --- runner -> scheduler -----------------------------------------------------------------------------------------


@attrs.frozen
class TokenLogprobs:
    """Log-probabilities at one position, natural log, of the raw logits.

    `top` holds (token id, logprob), the most likely first, and may contain `token_id`. `rank` is 1 for the most likely
    token.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


# Operation, implementation (cuda or native: a kernel of this project, cublas, torch, reference), why no kernel ran (""
# if one did), and the number of calls. There are few different ones: they depend on the model, not on requests.
KernelCall = tuple[str, str, str, int]


CORRUPTED = "The model produced numbers that are not finite."
CONTRADICTED = (
    "No token may be sampled: the request's parameters mask the whole vocabulary, or its grammar is too complex."
)


@attrs.frozen
class StepResult:
    """What a step produced. Columns are aligned with the plan's rows.

    Attributes:
        token_ids: Per row, the sampled tokens: none, or one plus one for each accepted draft.
        logprobs: Per row, one entry per sampled token; None for a row that did not ask, or if no row did.
        prompt_logprobs: request_id -> one entry per prompt position of this chunk (None for position 0).
        embeddings: request_id -> the complete embedding.
        failed: request_id -> why this row alone failed; CORRUPTED if its logits or its embedding were not finite,
            CONTRADICTED if its parameters leave no token.
        seconds: Time in model and sampler, measured by the runner.
        expert_tokens: Tokens routed to each expert, summed over the layers; None for a model without experts.
        kernel_calls: Calls since the previous result, by implementation; None if there are none.
        drafts: Per row, a draft model's drafts after the sampled tokens; None without a draft model.
    """

    step: int
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...] | None = None
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs | None, ...]] | None = None
    embeddings: Mapping[int, tuple[float, ...]] | None = None
    failed: Mapping[int, str] = attrs.field(factory=dict[int, str])
    seconds: float = 0.0
    expert_tokens: tuple[int, ...] | None = None
    kernel_calls: tuple[KernelCall, ...] | None = None
    drafts: tuple[tuple[int, ...], ...] | None = None


# --- scheduler -> client -----------------------------------------------------------------------------------------


@attrs.frozen
class Started:
    """Sent after the first step of a sequence, with the number of prompt tokens from the prefix cache."""

    cached_tokens: int


@attrs.frozen
class Progress:
    """How many tokens of the prompt are computed or from the prefix cache; only for those that asked for it."""

    num_tokens: int


@attrs.frozen
class Usage:
    """Token counts of one request; `cached_tokens` are the prompt tokens from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@attrs.frozen
class Tokens:
    """Tokens that one step added to a sequence."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


@attrs.frozen
class PromptLogprobs:
    """Log-probabilities of the whole prompt, sent once, before the first `Tokens`; None for the first position."""

    entries: tuple[TokenLogprobs | None, ...]


@attrs.frozen
class Embedding:
    """The embedding of a pooling request; `Finished` follows."""

    vector: tuple[float, ...]


@attrs.frozen
class Finished:
    """The last message of a sequence that did not fail.

    `stop_token_id` is the stop token that ended it; None for the primary end-of-sequence token.
    """

    reason: FinishReason
    usage: Usage
    stop_token_id: int | None = None


@attrs.frozen
class Failed:
    """The last message of a sequence that failed; `error` is one of trio_llm.errors."""

    error: Exception


Event = Started | Progress | Tokens | PromptLogprobs | Embedding | Finished | Failed

# --- scheduler -> its actor and metrics, once a step -------------------------------------------------------------


@attrs.frozen
class StepStats:
    """Statistics of one step.

    Attributes:
        seconds: Time in the model and the sampler.
        num_prefill_tokens: Tokens computed in rows that were not decodes, including recomputation.
        num_generated_tokens: Sampled tokens that were kept.
        num_running, num_waiting: Sequences after the step.
        num_preempted: Sequences preempted since the previous step's statistics.
        expert_tokens, kernel_calls: As in StepResult.
        num_held: Waiting sequences that wait for another sample of the same prompt to compute it.
        drafted: Number of rows with a first draft, with a second one, and so on.
        accepted: Number of rows whose first draft was accepted, whose second one, and so on.
    """

    step: int
    seconds: float
    num_rows: int
    num_tokens: int
    num_prefill_tokens: int
    num_generated_tokens: int
    num_running: int
    num_waiting: int
    num_preempted: int
    blocks: BlockStats
    expert_tokens: tuple[int, ...] | None = None
    num_held: int = 0
    kernel_calls: tuple[KernelCall, ...] | None = None
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()


@attrs.frozen
class Commit:
    """The outcome of a step: events for clients, and statistics. The tokens are columns with one entry per row.

    Attributes:
        first: (request_id, event) before the tokens.
        request_ids: The rows.
        token_ids: Per row, the tokens that its sequence keeps.
        logprobs: Per row, entries for at least these tokens; see StepResult.
        last: (request_id, event) after the tokens.
    """

    first: tuple[tuple[int, Event], ...]
    request_ids: tuple[int, ...]
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...] | None
    last: tuple[tuple[int, Event], ...]
    stats: StepStats

    @property
    def events(self) -> tuple[tuple[int, Event], ...]:
        """All events in the order in which to send them, made anew: while the next step runs, not between steps."""
        rows = zip(self.request_ids, self.token_ids, self.logprobs or repeat(None), strict=False)
        tokens = [(row, Tokens(kept, entries and entries[: len(kept)])) for row, kept, entries in rows if kept]
        return (*self.first, *tokens, *self.last)


@attrs.frozen
class StepTrace:
    """One step for a picture of the schedule: the rows of the plan, and the time."""

    request_ids: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    stats: StepStats
    own_s: float | None
