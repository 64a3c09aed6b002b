"""What the page shows of the engine."""

from __future__ import annotations

from typing import Literal

from trio_llm.server.answers.base import Answer


class ShownRequest(Answer, kw_only=True):
    """A request that runs or waits.

    Attributes:
        number: Number of the request in the engine.
        id: Id of its answer, if your API key made it; null for requests of others, and without keys.
        phase: "waiting", "prefill" or "decode".
        age_s: Seconds since it was submitted.
        prompt_tokens: Tokens of its prompt.
        cached_tokens: Those from the prefix cache.
        computed_tokens: Tokens of prompt and output that are computed.
        generated_tokens: Tokens of its output.
        preemptions: How often it lost its blocks.
        blocks: Blocks of the KV cache that it owns, alone or with others.
    """

    number: int
    id: str | None
    phase: Literal["waiting", "prefill", "decode"]
    age_s: float | None
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    generated_tokens: int
    preemptions: int
    blocks: int


class ShownPool(Answer, kw_only=True):
    """The blocks of the KV cache, in cells of consecutive blocks.

    Attributes:
        total_blocks: Number of blocks.
        blocks_per_cell: Blocks in a cell; more than one in a large pool.
        states: A letter per cell: "s" a block is shared, "u" one is used, "c" one is free and cached, "f" all are free.
        owners: Per cell, the number of a request that owns a block of it, 0 for none.
        references: Per cell, the largest number of owners of a block.
    """

    total_blocks: int
    blocks_per_cell: int
    states: str
    owners: tuple[int, ...]
    references: tuple[int, ...]


class ShownStep(Answer, kw_only=True):
    """A step that has ended.

    Attributes:
        step: Its number.
        ms: Time in model and sampler.
        own_ms: Time outside the model since the step before; null after idleness.
        rows: Sequences in it.
        tokens: Tokens that it computed.
        prefill_tokens: Those of prompts.
        generated_tokens: Tokens that were sampled and kept.
        preempted: Sequences that lost their blocks.
        queried_tokens: Prompt tokens that were looked up in the prefix cache.
        hit_tokens: Those that were found.
        drafted: Drafts that were verified.
        accepted: Those that were accepted.
    """

    step: int
    ms: float
    own_ms: float | None
    rows: int
    tokens: int
    prefill_tokens: int
    generated_tokens: int
    preempted: int
    queried_tokens: int
    hit_tokens: int
    drafted: int
    accepted: int


class ShownTimes(Answer, kw_only=True):
    """Times of tokens since the last state.

    Attributes:
        count: Number of tokens.
        p50_ms: Half of them took at most this long.
        p95_ms: 95 % of them took at most this long.
    """

    count: int
    p50_ms: float
    p95_ms: float


class LiveFrame(Answer, kw_only=True):
    """The engine at a moment. Each event is the newest state; a slow reader gets fewer.

    Attributes:
        at_s: When, in seconds since an arbitrary moment.
        running: Sequences that run.
        waiting: Sequences that wait.
        token_budget: Maximum tokens of a step.
        prompt_budget: Prompt tokens that a step may compute now; null if only `token_budget` limits it.
        pool: The blocks of the KV cache.
        requests: The first 256 requests, running ones first.
        steps: The steps since the event before, at most the last 1,024.
        first_token: Times from arrival to first token; null if there was none.
        inter_token: Times between tokens; null if there was none.
        recording: Whether steps are recorded; null on a server without --record.
    """

    at_s: float
    running: int
    waiting: int
    token_budget: int
    prompt_budget: int | None
    pool: ShownPool
    requests: list[ShownRequest]
    steps: list[ShownStep]
    first_token: ShownTimes | None
    inter_token: ShownTimes | None
    recording: bool | None


class Recording(Answer, kw_only=True):
    """Whether steps are recorded.

    Attributes:
        recording: Whether they are.
    """

    recording: bool
