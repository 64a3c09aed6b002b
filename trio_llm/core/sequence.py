"""One sequence of the scheduler: its tokens, how many of them are computed, and when it stops."""

from __future__ import annotations

import enum

import attrs

from trio_llm.core.prompt_lookup import PromptLookup
from trio_llm.messages import FinishReason, TokenLogprobs, Usage
from trio_llm.params import PoolingParams, SamplingParams, Submission


class Status(enum.Enum):
    """State of a sequence. HELD waits for its leader's prompt and does not block others."""

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@attrs.frozen
class StopCondition:
    """When a sequence stops.

    Attributes:
        max_len: Number of tokens, prompt included, at which it stops for length, even below min_len. The prompt's
            length for an embedding.
        min_len: Number of tokens, prompt included, below which stop tokens do not count.
        stop_ids: Tokens that stop it.
        primary_eos: The stop token that Finished does not name; None if it does not stop the sequence.
    """

    max_len: int
    min_len: int = 0
    stop_ids: frozenset[int] = frozenset()
    primary_eos: int | None = None

    @classmethod
    def of(
        cls, params: SamplingParams | PoolingParams, num_prompt_tokens: int, max_model_len: int, eos: tuple[int, ...]
    ) -> StopCondition:
        """Derive the condition from a request's parameters and the model's end-of-sequence ids, primary one first."""
        if isinstance(params, PoolingParams):
            return cls(num_prompt_tokens)
        max_len = max_model_len
        if params.max_tokens is not None:
            max_len = min(max_len, num_prompt_tokens + params.max_tokens)
        eos = () if params.ignore_eos else eos
        stop_ids = frozenset(params.stop_token_ids).union(eos)
        return cls(max_len, num_prompt_tokens + params.min_tokens, stop_ids, eos[0] if eos else None)

    def reason(self, num_tokens: int, newest: int) -> FinishReason | None:
        """Return why the newest token stops a sequence that now has `num_tokens`; None if it does not."""
        if newest in self.stop_ids and num_tokens >= self.min_len:
            return "stop"
        return "length" if num_tokens >= self.max_len else None

    def cut(self, num_tokens: int, newest: tuple[int, ...]) -> tuple[int, ...]:
        """Return the newest tokens, which follow `num_tokens` others, up to the first that stops the sequence."""
        for at, token_id in enumerate(newest, start=1):
            if self.reason(num_tokens + at, token_id) is not None:
                return newest[:at]
        return newest


@attrs.define(eq=False, repr=False)
class Sequence:
    """State of one request inside the core. Only the scheduler changes it.

    Attributes:
        submission: The request, as its client made it.
        tokens: Prompt and output.
        key: (priority, arrival): its unique place in policy order, smaller first.
        stop: When it stops.
        computed: Tokens whose KV is computed and committed.
        scheduled: Tokens whose KV is computed after the steps in flight.
        target: Tokens that can be scheduled: the known ones, plus one that a step in flight samples, unless it is the
            last.
        prompt_computed: The whole prompt was computed at least once; followers may run.
        unsent: Tokens that the KV manager does not know yet.
        cached_tokens: Prompt tokens found in the prefix cache at the first admission, None before it.
        announced: Its client has got a Started.
        failed: Its KV must not be shared.
        known_to_blocks, known_to_runner: Whether the KV manager and the runner must be informed when it ends.
        followers: Sequences held until this one's prompt is computed.
        prompt_logprobs: Collected over the chunks of the prompt; cleared when sent.
        drafts: Draft tokens to verify in its next step.
        lookup: The n-gram index of its tokens; None before its first draft, or without prompt look-up.
    """

    request_id: int
    submission: Submission
    key: tuple[int, int]
    stop: StopCondition
    tokens: list[int]
    status: Status = Status.WAITING
    computed: int = 0
    scheduled: int = 0
    target: int = attrs.field(default=attrs.Factory(lambda self: len(self.tokens), takes_self=True))
    num_prompt_tokens: int = attrs.field(default=attrs.Factory(lambda self: len(self.prompt), takes_self=True))
    prompt_computed: bool = False
    unsent: tuple[int, ...] = ()
    cached_tokens: int | None = None
    announced: bool = False
    num_preemptions: int = 0
    failed: bool = False
    known_to_blocks: bool = False
    known_to_runner: bool = False
    followers: list[Sequence] = attrs.field(factory=list["Sequence"])
    prompt_logprobs: list[TokenLogprobs | None] = attrs.field(factory=list["TokenLogprobs | None"])
    drafts: tuple[int, ...] = ()
    lookup: PromptLookup | None = None

    def __repr__(self) -> str:
        output = len(self.tokens) - len(self.prompt)
        return (
            f"<Sequence {self.request_id} {self.status.value}: prompt {len(self.prompt)} + output {output}, "
            f"{self.computed} computed>"
        )

    def restart(self) -> Sequence:
        """Return a copy that waits to be recomputed. It replaces this object, which ends here.

        Steps in flight keep this object, so their results for it are dropped.
        """
        self.status = Status.ENDED
        return attrs.evolve(
            self,
            status=Status.WAITING,
            computed=0,
            scheduled=0,
            target=len(self.tokens),
            num_preemptions=self.num_preemptions + 1,
            prompt_logprobs=[],
            drafts=(),
        )

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.submission.prompt_token_ids

    @property
    def params(self) -> SamplingParams | PoolingParams:
        return self.submission.params

    @property
    def waiting_key(self) -> tuple[int, int, int]:
        """Place among the waiting sequences: a preempted one comes before all others of its priority."""
        priority, arrival = self.key
        return priority, 0 if self.num_preemptions else 1, arrival

    @property
    def pooling(self) -> bool:
        return isinstance(self.params, PoolingParams)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return isinstance(self.params, SamplingParams) and self.params.prompt_logprobs is not None

    @property
    def read_cache(self) -> bool:
        """Whether it may use cached KV. Not if every prompt position must yield a result."""
        return not self.pooling and not self.wants_prompt_logprobs

    @property
    def trusted(self) -> int:
        """Number of leading tokens that the KV manager knows and may share; -1 if the sequence failed."""
        return -1 if self.failed else min(self.computed, len(self.tokens) - len(self.unsent))

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt), len(self.tokens) - len(self.prompt), self.cached_tokens or 0)
