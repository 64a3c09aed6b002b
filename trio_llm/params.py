"""The parameters of a request, and the Submission that carries it to the scheduler (floor 0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import attrs

from trio_llm.errors import InvalidRequestError


class GrammarMatcher(Protocol):
    """One sequence's state in its grammar."""

    def fill(self, address: int, num_bytes: int, /) -> str | None:
        """Write which tokens may come next, one bit per id, little-endian; return why it cannot, or None."""
        ...

    def consume(self, token_ids: Sequence[int], /) -> int:
        """Advance past output tokens, up to the first that is not allowed; return the number of tokens passed."""
        ...

    def rollback(self, num_tokens: int, /) -> None:
        """Undo the last `num_tokens` consumed tokens."""
        ...


class Grammar(Protocol):
    """A compiled grammar, shared by the sequences that it constrains."""

    def matcher(self) -> GrammarMatcher:
        """Return the state of a sequence without output."""
        ...


@attrs.frozen(kw_only=True)
class RepetitionDetection:
    """When to end an output that repeats itself: its last tokens are one pattern, `min_count` times in a row.

    Attributes:
        max_pattern_size, min_pattern_size: Length of the pattern in tokens.
    """

    max_pattern_size: int
    min_count: int
    min_pattern_size: int = 1


@attrs.frozen(kw_only=True)
class StructuredOutputs:
    """The form of an output: exactly one of the first five. Names are vLLM's.

    Attributes:
        json: A JSON schema, as an object or as text.
        regex: A regular expression that the whole output matches (Rust's syntax).
        choice: Strings, one of which is the output.
        grammar: A grammar in Lark or GBNF.
        json_object: True for one JSON object of any shape.
        disable_any_whitespace: Write JSON with the separators of json.dumps and no other whitespace.
    """

    json: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False


def _stop(given: str | Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    return given if isinstance(given, tuple) else tuple(given or ())


@attrs.frozen(kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a request ends. Names, defaults and ranges are vLLM's.

    Attributes:
        temperature: 0 is greedy.
        top_k: Keep the k most likely tokens; 0 or -1 keeps all.
        min_p: Drop tokens less likely than min_p times the most likely one.
        presence_penalty, frequency_penalty: Subtracted from the logits of tokens already in the output.
        repetition_penalty: Divides the logits of tokens in prompt or output if positive, else multiplies them.
        logit_bias: Token id -> added to its logit.
        allowed_token_ids: The only tokens that may be sampled.
        bad_words_token_ids: Token sequences whose last token is masked after the rest of it was produced.
        seed: The same seed and prompt give the same output, whatever else is in the batch. None draws a new one.
        max_tokens: Maximum output tokens; None means what the context has left.
        min_tokens: Number of output tokens below which nothing stops the output.
        stop: Strings that end the output, or one string; found across token boundaries.
        logprobs: Report the sampled token and this many of the most likely ones; -1 means the whole vocabulary.
        logprob_token_ids: Also report these tokens, if `logprobs` is not None.
        prompt_logprobs: The same for each prompt token after the first.
        repetition_detection: End an output that repeats itself, once it has min_tokens.
        grammar: Constrains the output. End-of-sequence is allowed only where the grammar is complete.
        structured_outputs: The same, not yet compiled: `LLM` turns it into `grammar`. The engine refuses it.
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
    stop: tuple[str, ...] = attrs.field(default=(), converter=_stop)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    repetition_detection: RepetitionDetection | None = None
    grammar: Grammar | None = None
    structured_outputs: StructuredOutputs | None = None


@attrs.frozen(kw_only=True)
class PoolingParams:
    """How the hidden states of a prompt become one vector (embeddings)."""

    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    dimensions: int | None = None


def _token_ids(token_ids: Sequence[int]) -> tuple[int, ...]:
    if isinstance(token_ids, str | bytes):
        raise InvalidRequestError(
            "prompt_token_ids is text: encode it first, with tokenizer.encode(text).", param="prompt"
        )
    ids = tuple(token_ids)
    for kind in set(map(type, ids)) - {int}:
        raise InvalidRequestError(
            f"prompt_token_ids must be integers, not {kind.__name__} (an array or tensor has tolist()).", param="prompt"
        )
    return ids


@attrs.frozen
class Submission:
    """One request for the scheduler. The endpoint makes it, and it reaches the scheduler as it is.

    Only admission changes it, once: it draws the seed and resolves `max_tokens`.

    Attributes:
        prompt_token_ids: At least one. Text, or anything but integers, is an InvalidRequestError.
        priority: Smaller is scheduled first, under the "priority" policy only.
        background: Scheduled after every request that is not, under any policy, and preempted before it.
        salt: Requests share cached prompt blocks only within one salt.
        leader: The request_id of an open request with the same prompt. This one waits for that one's prefill, to find
            the prompt in the prefix cache.
        reports_progress: A Progress follows each step that computes a part of the prompt.
    """

    prompt_token_ids: tuple[int, ...] = attrs.field(converter=_token_ids)
    params: SamplingParams | PoolingParams
    priority: int = attrs.field(default=0, kw_only=True)
    background: bool = attrs.field(default=False, kw_only=True)
    salt: bytes = attrs.field(default=b"", kw_only=True)
    leader: int | None = attrs.field(default=None, kw_only=True)
    reports_progress: bool = attrs.field(default=False, kw_only=True)

    @property
    def num_samples(self) -> int:
        """Number of answers to the prompt."""
        return self.params.n if isinstance(self.params, SamplingParams) else 1

    @property
    def max_tokens(self) -> int:
        """Maximum output tokens, once the parameters are final; 0 for an embedding."""
        return (self.params.max_tokens or 0) if isinstance(self.params, SamplingParams) else 0


def check_prompt_length(
    num_tokens: int, max_model_len: int, *, generates: bool, name: str = "prompt", at_least: bool = False
) -> None:
    """Refuse a prompt that has no tokens or does not fit the context, in the words that client libraries recognise.

    Args:
        num_tokens: Tokens of the prompt.
        generates: The context needs room for one token of output, too.
        name: The field that holds the prompt, as the client calls it.
        at_least: `num_tokens` is a lower bound, known before the text is tokenized.
    Raises:
        InvalidRequestError: With the code "context_length_exceeded" and both numbers if the prompt is too long.
    """
    if num_tokens == 0 and not at_least:
        raise InvalidRequestError(f"The {name} has no tokens: at least one is needed.", param=name)
    if num_tokens > max_model_len - generates:
        room = " One token of output needs room, too." if generates else ""
        raise InvalidRequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, your {name} resulted in "
            f"{'at least ' if at_least else ''}{num_tokens} tokens. Please reduce the length of the {name}.{room}",
            param=name,
            code="context_length_exceeded",
        )


def check_max_tokens(name: str, value: int | None, max_model_len: int) -> int | None:
    """Refuse a limit beyond the context length; a limit beyond the rest after the prompt is clamped later.

    Args:
        name: The field, as the client calls it.
    """
    if value is not None and value > max_model_len:
        raise InvalidRequestError(
            f"{name} = {value} is not allowed: this model's maximum context length is {max_model_len} tokens.",
            param=name,
        )
    return value
