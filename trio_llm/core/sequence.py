"""One sequence of the scheduler: its tokens, how far they are computed, and when it has had enough."""

from __future__ import annotations

import enum

import attrs

from trio_llm.core.speculate import PromptLookup
from trio_llm.messages import FinishReason, PoolingParams, SamplingParams, TokenLogprobs, Usage


class Status(enum.Enum):
    """Where a sequence is. HELD waits for its leader's prompt and stands in nobody's way."""

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@attrs.frozen
class Limits:
    """When a sequence ends by itself.

    Attributes:
        max_len: Tokens, prompt included, at which it ends for length, even before min_len: there is no room. A text to
            embed ends with its prompt.
        min_len: Tokens it must have before a stop token counts.
        stop_ids: Tokens that end it.
        primary_eos: The stop token that needs no mention in Finished; None where it does not end the sequence.
    """

    max_len: int
    min_len: int = 0
    stop_ids: frozenset[int] = frozenset()
    primary_eos: int | None = None

    @classmethod
    def of(
        cls, params: SamplingParams | PoolingParams, num_prompt_tokens: int, max_model_len: int, eos: tuple[int, ...]
    ) -> Limits:
        """Work them out from the parameters of a request and the end-of-sequence ids of a model, primary one first."""
        if isinstance(params, PoolingParams):
            return cls(num_prompt_tokens)
        max_len = max_model_len
        if params.max_tokens is not None:
            max_len = min(max_len, num_prompt_tokens + params.max_tokens)
        eos = () if params.ignore_eos else eos
        stop_ids = frozenset(params.stop_token_ids).union(eos)
        return cls(max_len, num_prompt_tokens + params.min_tokens, stop_ids, eos[0] if eos else None)

    def reason(self, num_tokens: int, newest: int) -> FinishReason | None:
        """Say whether the newest token ends a sequence that now has `num_tokens`, and why."""
        if newest in self.stop_ids and num_tokens >= self.min_len:
            return "stop"
        return "length" if num_tokens >= self.max_len else None

    def cut(self, num_tokens: int, newest: tuple[int, ...]) -> tuple[int, ...]:
        """Return those of the newest tokens, which come after `num_tokens` others, up to the first that ends it."""
        for at, token_id in enumerate(newest, start=1):
            if self.reason(num_tokens + at, token_id) is not None:
                return newest[:at]
        return newest


@attrs.define(eq=False, repr=False)
class Sequence:
    """State of one request inside the core; read-only to everybody but the scheduler.

    Attributes:
        prompt: The prompt's tokens.
        tokens: Prompt and output.
        key: (priority, arrival), the place in the policy's order; smaller is earlier; unique.
        limits: When it ends.
        computed: Tokens whose KV is really computed.
        scheduled: Tokens whose KV is computed once the steps in flight are done.
        target: Tokens that can be scheduled: those known, and one that a step in flight samples unless it is the last.
        prompt_computed: The whole prompt was computed at least once; followers may go.
        unsent: Tokens sampled since the KV manager last heard of it.
        cached_tokens: Prompt tokens found in the prefix cache at the first admission, None before it.
        announced: Its client was told that it started.
        failed: What it computed is not to be trusted.
        known_to_blocks, known_to_runner: Who has to be told that it is gone.
        followers: Sequences held until this one's prompt is computed.
        prompt_logprobs: Gathered over the chunks of the prompt, empty again once they were sent.
        drafts: What may follow its tokens.
        lookup: Where its drafts are looked up; None where they are not, or not yet.
    """

    request_id: int
    prompt: tuple[int, ...]
    params: SamplingParams | PoolingParams
    salt: bytes
    key: tuple[int, int]
    limits: Limits
    tokens: list[int]
    status: Status = Status.WAITING
    computed: int = 0
    scheduled: int = 0
    target: int = attrs.field(default=attrs.Factory(lambda self: len(self.tokens), takes_self=True))
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
        """Return the sequence as it waits to be computed again; it takes the place of this one, which ends here.

        Steps in flight keep this one, so what they yield for it falls on nobody.
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
    def waiting_key(self) -> tuple[int, int, int]:
        """Place among the waiting: a preempted sequence stands before all others of its priority."""
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
        """Whether KV of others may stand in for computing; not where every position must yield something."""
        return not self.pooling and not self.wants_prompt_logprobs

    @property
    def trusted(self) -> int:
        """Of its first tokens, how many the KV manager knows and may let others use; -1 where it failed."""
        return -1 if self.failed else min(self.computed, len(self.tokens) - len(self.unsent))

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt), len(self.tokens) - len(self.prompt), self.cached_tokens or 0)
