"""All messages: what clients, actors, the pure core and the runner say to each other (floor 0).

Words, one per idea: request (HTTP, handle), sequence (core), row (inside a step), block, step, plan, result.
Hot messages hold columns (tuples of equal length), not one object per row: a frozen object per row costs
ten times as much at 256 rows. Prompts travel once, at admission; block tables travel as additions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import attrs

FinishReason = Literal["stop", "length", "repetition", "abort"]

UNKNOWN = -1
"""Stands in a StepPlan for the token that the step planned directly before it samples for the same sequence."""

# --- what a request asks for -------------------------------------------------------------------------------------


class GrammarMatcher(Protocol):
    """One sequence's state in its grammar."""

    def fill(self, address: int, num_bytes: int, /) -> str | None:
        """Write which tokens may come next, a bit per id, little-endian; return why it cannot, or None."""
        ...

    def consume(self, token_ids: Sequence[int], /) -> int:
        """Advance past tokens of the output, up to the first that may not come; return how many that were."""
        ...

    def rollback(self, num_tokens: int, /) -> None:
        """Go back to where it was before the last `num_tokens` that it consumed."""
        ...


class Grammar(Protocol):
    """A compiled grammar, shared by the sequences that are held to it."""

    def matcher(self) -> GrammarMatcher:
        """Return the state of a sequence without output."""
        ...


@attrs.frozen(kw_only=True)
class RepetitionDetection:
    """When an output goes in circles: its last tokens are one pattern, `min_count` times in a row.

    Attributes:
        max_pattern_size, min_pattern_size: Tokens of the pattern.
    """

    max_pattern_size: int
    min_count: int
    min_pattern_size: int = 1


@attrs.frozen(kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a request ends. Names, defaults and ranges are vLLM's.

    Attributes:
        temperature: 0 is greedy.
        top_k: Keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: Drop tokens less likely than min_p times the likeliest.
        presence_penalty, frequency_penalty: Subtracted from the logits of tokens already in the output.
        repetition_penalty: Divides (multiplies, when negative) the logits of tokens in the prompt or output.
        logit_bias: Token id -> added to its logit.
        allowed_token_ids: The only tokens that may be sampled.
        bad_words_token_ids: Token sequences whose last token is masked after the rest of it was produced.
        seed: Same seed, same prompt, same output, whatever else is in the batch; None draws a fresh one.
        max_tokens: At most so many output tokens; None is what is left of the context.
        min_tokens: End-of-sequence, stop ids and stop strings are held back until so many.
        stop: Strings that end the output; found across token borders.
        logprobs: Report the sampled token and this many of the likeliest; -1 for the whole vocabulary.
        logprob_token_ids: Report these tokens too, where `logprobs` is not None.
        prompt_logprobs: The same for each prompt token after the first.
        repetition_detection: End an output that goes in circles, once it has min_tokens.
        grammar: What the output must be a sentence of; end-of-sequence comes only where it is complete.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = attrs.field(factory=dict[int, float])
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    repetition_detection: RepetitionDetection | None = None
    grammar: Grammar | None = None


@attrs.frozen(kw_only=True)
class PoolingParams:
    """How the hidden states of a prompt become one vector (embeddings)."""

    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    dimensions: int | None = None


# --- scheduler -> KV manager, once a step ------------------------------------------------------------------------


@attrs.frozen
class Admit:
    """Tell the KV manager of a sequence before it first waits for blocks; its tokens travel this once.

    Attributes:
        salt: Only sequences with the same salt share blocks.
        read_cache: False where every position must be computed (prompt logprobs, pooling).
    """

    request_id: int
    token_ids: tuple[int, ...]
    salt: bytes = b""
    read_cache: bool = True


@attrs.frozen
class BlockAsk:
    """What a step needs of the KV pool. Handled in this order: released, admits, running rows, waiting.

    Steps run in the order of their plans, each after the one before it has ended. So blocks may change hands although
    a planned step still reads or writes them for their last owner: whoever gets them comes later.

    Attributes:
        released: Sequences that ended; they leave the manager.
        released_computed: Per released sequence, tokens whose KV was really computed; -1 where it failed, so that
            nothing it wrote may be shared.
        request_ids: Every running sequence, in the order they are to be served.
        computed: Per running row, tokens whose KV was really computed: the steps in flight are not counted.
        starts: Per running row, where it goes on; the steps in flight compute what lies between.
        ends: Per running row, the position up to which it would compute in this step; the budget may cut it. Where it
            equals the start, the sequence has no row in this step.
        new_token_ids: Per running row, tokens sampled since the last ask.
        preempt_order: The same sequences in policy order; when blocks run out the last one goes first.
        waiting: Candidates in policy order. The first that cannot have its blocks stops admission.
        token_budget: Tokens of the step, over all rows.
        max_row_tokens: Tokens of one waiting row; at most the budget.
        drafts: Per running row and then per waiting one, the drafts that it would compute too, beyond its last known
            token. They get what all rows leave of the budget. Empty, as is the next, where nobody speculates.
        room_ends: Of the same, the position up to which slots would be of use once it computes its last known token:
            for its drafts, and for those that a draft model goes on to. From blocks that nobody else asks for.
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
    room_ends: tuple[int, ...] = ()


# --- KV manager -> scheduler -------------------------------------------------------------------------------------


@attrs.frozen
class BlockStats:
    """The pool after a step's blocks were handed out.

    Attributes:
        total_blocks: Blocks that can hold tokens (the null block is none of them).
        used_blocks: Per KV group, blocks that some sequence owns.
        cached_blocks: Blocks that nobody owns but that a prompt may still hit; they are free all the same.
        queried_tokens, hit_tokens: Of the sequences admitted for the first time in this step.
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
        num_admitted: So many rows at the end were waiting; their `starts` are their prefix hits.
        new_blocks: As in StepPlan.
        preempted: Sequences that lost all their blocks, first victim first; none of them has a row.
        drafts: So many of the row's tokens are drafts, the last ones; empty where nobody speculates.
        capacities: Tokens for which the row's sequence has slots; empty where nobody speculates.
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
    """What the runner must know of a sequence before its first row.

    `token_ids` is the prompt, followed after a preemption by the output so far; the first
    `num_prompt_tokens` are the prompt.
    """

    request_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    params: SamplingParams | PoolingParams


@attrs.frozen
class StepPlan:
    """One forward over a ragged batch. Columns of one entry per row unless said otherwise.

    Applied in this order: `dropped` (sequences the runner forgets), `admitted` (sequences it learns),
    `new_blocks`, then the rows run. Applying the same plan twice changes nothing (a failed step is retried in halves).

    Attributes:
        request_ids: The rows, in batch order; at most one row per sequence.
        starts: Position of the row's first token; everything before it is in the KV cache once the steps planned
            earlier have run.
        counts: Tokens the row computes.
        token_ids: Flat over the rows, sum(counts) long. A row of one token may be UNKNOWN: its result means nothing
            where the step before sampled nothing for it, or its end.
        samples: True where the row's last token is the last one there is, so that a token is sampled after it
            (for a pooling row: where its vector is complete).
        new_blocks: Per row, per KV group: (index in the block table, block ids to write from there on).
            An empty tuple where a row has none. Block 0 is the null block: never written, never read.
        drafts: How many of the row's last tokens are drafts, guesses at what is sampled: a token is sampled after each
            of them and after the token before them. Empty where nobody speculates.
        reaches: The position before which a draft model may compute, in blocks that the sequence has; 0 where it is
            to guess nothing. Empty where there is no such model.
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
    reaches: tuple[int, ...] = ()


# --- runner -> scheduler -----------------------------------------------------------------------------------------


@attrs.frozen
class TokenLogprobs:
    """Log-probabilities at one position, natural log, of the raw logits.

    `top` holds (token id, logprob), likeliest first; it may or may not contain `token_id` itself.
    `rank` is 1 for the likeliest token.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


# Operation, what it ran on (cuda: a kernel of this project, cublas, reference), why not a kernel ("" where one did),
# and how often. Few different ones: they depend on the model, not on requests.
KernelCall = tuple[str, str, str, int]


CORRUPTED = "The model produced numbers that are not finite."


@attrs.frozen
class StepResult:
    """What a step produced. Columns are aligned with the plan's rows.

    Attributes:
        token_ids: The tokens sampled in each row: empty, or one, or one more for each draft that was right.
        logprobs: Per row, one entry per sampled token; None where a row did not ask, or at all.
        prompt_logprobs: request_id -> one entry per prompt position of this chunk (None for position 0).
        embeddings: request_id -> the finished vector.
        failed: request_id -> why this row alone failed; CORRUPTED where its logits or its vector were not finite.
        seconds: Time in the model and the sampler, measured by the runner.
        expert_tokens: Tokens that each expert was given, added up over the layers; None for a model without experts.
        kernel_calls: What operations ran on since the result before; None where nothing is counted (on a CPU).
        drafts: Per row, what a draft model guesses to follow the sampled tokens; None without such a model.
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
    """Sent after the first step with a row of this sequence: so much of the prompt came from the prefix cache."""

    cached_tokens: int


@attrs.frozen
class Usage:
    """Token counts of one request; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@attrs.frozen
class Tokens:
    """Tokens one step added to a sequence."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


@attrs.frozen
class PromptLogprobs:
    """Log-probabilities of the whole prompt, once, before the first `Tokens`; None for the first position."""

    entries: tuple[TokenLogprobs | None, ...]


@attrs.frozen
class Embedding:
    """The vector of a pooling request; `Finished` follows."""

    vector: tuple[float, ...]


@attrs.frozen
class Finished:
    """The last message of a sequence that ended well.

    `stop_token_id` is the stop id or secondary end-of-sequence id that ended it, None for the primary one.
    """

    reason: FinishReason
    usage: Usage
    stop_token_id: int | None = None


@attrs.frozen
class Failed:
    """The last message of a sequence that did not; `error` is one of trio_llm.errors."""

    error: Exception


Event = Started | Tokens | PromptLogprobs | Embedding | Finished | Failed

# --- scheduler -> its actor and metrics, once a step -------------------------------------------------------------


@attrs.frozen
class StepStats:
    """One step in numbers.

    Attributes:
        seconds: Time in the model and the sampler.
        num_prefill_tokens: Tokens computed in rows that were not decodes; after a preemption some for the second time.
        num_generated_tokens: Tokens that were sampled and kept.
        num_running, num_waiting: Sequences after the step.
        num_preempted: Sequences that lost their blocks since the step before was counted.
        expert_tokens, kernel_calls: As in StepResult.
        num_held: Of those waiting, how many wait for another sample of their prompt to compute it.
        drafted: In how many rows there was a first draft, a second one and so on.
        accepted: In how many rows the first draft was kept, the second one and so on.
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
    """What a step's result meant: events in the order they are to be sent, and the step in numbers."""

    events: tuple[tuple[int, Event], ...]
    stats: StepStats


@attrs.frozen
class StepTrace:
    """One step as a picture of the schedule needs it: the plan's rows and where the time went."""

    request_ids: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    stats: StepStats
    own_s: float | None


# --- model -> everyone, once at start ----------------------------------------------------------------------------


@attrs.frozen
class KVGroup:
    """Attention layers that share one block table.

    Attributes:
        layers: Indices of the layers that own KV storage in this group.
        block_size: Tokens per block. A power of two; groups of one model may differ (the layers of different
            head sizes share one pool of equal-sized blocks).
        window: Tokens visible to a query, itself included; None for all.
    """

    layers: tuple[int, ...]
    block_size: int
    window: int | None = None


@attrs.frozen(kw_only=True)
class ModelInfo:
    """What floors above the model know of it.

    Attributes:
        num_kv_blocks: Blocks in the pool, the null block 0 included.
        block_bytes: Bytes of one block over all the layers it serves.
        eos_token_ids: From generation_config, the primary one first.
        on_gpu: Whether steps run beside the host.
        memory_table: What the memory goes to, in lines for people; "" if nobody counted.
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    kv_groups: tuple[KVGroup, ...]
    num_kv_blocks: int
    block_bytes: int
    dtype: str
    default_sampling: Mapping[str, float | int] = attrs.field(factory=dict[str, float | int])
    on_gpu: bool = False
    memory_table: str = attrs.field(default="", repr=False)


@attrs.frozen
class Progress:
    """How far loading is: `done` of `total`, counted in `unit`. `stage` is a few words for a human."""

    stage: str
    done: int
    total: int
    unit: Literal["tensors", "bytes", "steps"] = "tensors"
