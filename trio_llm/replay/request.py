"""A request as a record keeps it."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec
from msgspec import Struct

from trio_llm.params import PoolingParams, SamplingParams, Submission

PLAIN, STOP = 0, 1
"""In a replay without tokens, a token that goes on, and one that ends its sequence."""

_NOT_KEPT = ("grammar", "structured_outputs")


class Request(Struct, frozen=True, array_like=True):
    """What the scheduler needs to know of a request, and with tokens what the model needs too.

    Attributes:
        max_tokens: None for an embedding.
        scores: It asks for the logprobs of its prompt.
        constrained: It has a grammar, which a record does not keep.
        prompt: The token ids; None in a record without tokens, like `sampling`.
        sampling: The sampling parameters that are not at their defaults, without the grammar.
    """

    request_id: int
    num_prompt_tokens: int
    max_tokens: int | None
    min_tokens: int = 0
    scores: bool = False
    constrained: bool = False
    priority: int = 0
    background: bool = False
    leader: int | None = None
    prompt: tuple[int, ...] | None = None
    sampling: dict[str, Any] | None = None

    @classmethod
    def of(cls, request_id: int, submission: Submission, *, tokens: bool) -> Request:
        """Keep a submission, with its tokens or without."""
        params, prompt = submission.params, submission.prompt_token_ids
        samples = isinstance(params, SamplingParams)
        return cls(
            request_id=request_id,
            num_prompt_tokens=len(prompt),
            max_tokens=submission.max_tokens if samples else None,
            min_tokens=params.min_tokens if samples else 0,
            scores=samples and params.prompt_logprobs is not None,
            constrained=samples and params.grammar is not None,
            priority=submission.priority,
            background=submission.background,
            leader=submission.leader,
            prompt=prompt if tokens else None,
            sampling=_changed(params) if tokens and samples else None,
        )

    @property
    def pools(self) -> bool:
        """Whether it asks for an embedding."""
        return self.max_tokens is None

    def submission(self) -> Submission:
        """Return a submission that the scheduler treats like the recorded one."""
        prompt = (PLAIN,) * self.num_prompt_tokens if self.prompt is None else self.prompt
        return Submission(
            prompt, self._params(), priority=self.priority, background=self.background, leader=self.leader
        )

    def _params(self) -> SamplingParams | PoolingParams:
        if self.pools:
            return PoolingParams()
        if self.sampling is not None:
            return msgspec.convert(self.sampling, SamplingParams)
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=True,
            stop_token_ids=(STOP,),
            prompt_logprobs=0 if self.scores else None,
        )


def _changed(params: SamplingParams) -> dict[str, Any]:
    default = SamplingParams()
    names = (field.name for field in attrs.fields(SamplingParams) if field.name not in _NOT_KEPT)
    return {name: getattr(params, name) for name in names if getattr(params, name) != getattr(default, name)}
