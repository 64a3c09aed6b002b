"""A checkpoint through cache, chunks, batches, preemption and speculation, each compared with transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from trio_llm.config import EngineConfig
from trio_llm.core.prompt_lookup import LookupSizes
from trio_llm.core.speculation import Speculation
from trio_llm.errors import ConfigError
from trio_llm.messages import TokenLogprobs
from trio_llm.model.load import load_runner
from trio_llm.model.loading.loader import inspect_model
from trio_llm.params import SamplingParams
from trio_llm.verify.drive import Outcome, least_blocks, run
from trio_llm.verify.reference import Reference, library

# Of the largest logit. The differences of float32 are 100 times smaller; a wrong detail of a model is larger than this.
TOLERANCE = 2e-4
_NUM_TOKENS = 20
_GREEDY = SamplingParams(temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True, logprobs=20)
_CHUNK = 7
_LENGTHS = (90, 41, 24, 1)
_SPECULATION = Speculation(4, LookupSizes(1, 3))


@attrs.frozen
class Row:
    """One way to serve the prompts.

    Attributes:
        error: The largest difference of log-probabilities, in nats, over the 20 likeliest tokens at each position.
        bound: What it may be: TOLERANCE of the largest logit.
        equal: Tokens that transformers finds likeliest too, or within the bound of the likeliest.
        tokens: All tokens.
        went_through: What the way is about happened: tokens taken from the cache, preemptions, drafted tokens, ...
    """

    way: str
    error: float
    bound: float
    equal: int
    tokens: int
    went_through: int

    @property
    def ok(self) -> bool:
        """Whether the way gives what transformers gives. NaN does not."""
        return self.error <= self.bound and self.equal == self.tokens and self.went_through > 0


@attrs.frozen
class _Way:
    """Settings of a run, and which count of its outcome shows that it was what its name says."""

    shown_by: Callable[[Outcome], int]
    settings: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    small_pool: bool = False


WAYS: dict[str, _Way] = {
    "one at a time": _Way(lambda outcome: outcome.num_steps, {"caching": False, "batch_size": 1}),
    "prefix cache": _Way(lambda outcome: outcome.hit_tokens, {"batch_size": 1}),
    "batches": _Way(lambda outcome: outcome.num_steps, {"caching": False}),
    "chunks": _Way(lambda outcome: outcome.num_steps, {"caching": False, "chunk": _CHUNK}),
    "preemption": _Way(lambda outcome: outcome.num_preempted, {"chunk": _CHUNK}, small_pool=True),
    "speculation": _Way(lambda outcome: outcome.num_drafted, {"speculation": _SPECULATION}),
}


def verify(engine: EngineConfig, report: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Compare a checkpoint with transformers in float32.

    The two models are in memory one after the other.

    Args:
        engine: Uses model, revision, device, block_size.
        report: Called with what is being done.
    Raises:
        CheckpointError: The checkpoint cannot be read by one of the two, or transformers is not installed.
        ConfigError: The model's context is too short for the prompts.
    """
    library()  # fails now if it is not installed, not after minutes
    engine = attrs.evolve(engine, dtype="float32", max_batch_size=16)
    plan = inspect_model(engine)
    longest = _LENGTHS[0] + 5 + _NUM_TOKENS
    if plan.max_model_len < longest:
        raise ConfigError("model", engine.model, "verify", f"must have a context of at least {longest} tokens")
    prompts = make_prompts(plan.config.text.get_int("vocab_size"), _LENGTHS)
    runner = load_runner(engine, as_stored=False)  # with blocks as stored, activations would be rounded to 8 bits
    outcomes: dict[str, Outcome] = {}
    for name, way in WAYS.items():
        report(name)
        blocks = least_blocks(runner, longest, _CHUNK) + 4 if way.small_pool else None
        outcomes[name] = run(runner, [(prompt, _GREEDY) for prompt in prompts], num_blocks=blocks, **way.settings)
    runner.close()
    report("transformers")
    reference = Reference(plan)
    known: dict[tuple[int, ...], Tensor] = {}
    return [_row(name, prompts, outcome, reference, known) for name, outcome in outcomes.items()]


def make_prompts(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    """Return four prompts per length, the same every time.

    Three begin alike, so that they share prefixes that end inside a block, at its border and in between; the fourth
    repeats itself, so that prompt look-up finds drafts.
    """
    generator = torch.Generator().manual_seed(11)

    def draw(length: int) -> list[int]:
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    prompts: list[list[int]] = []
    for length in lengths:
        base, other = draw(length), draw(5)
        prompts += [base, base[: length // 2] + other, base + other, (other * length)[: length + 5]]
    return prompts


def _row(
    name: str,
    prompts: Sequence[list[int]],
    outcome: Outcome,
    reference: Reference,
    known: dict[tuple[int, ...], Tensor],
) -> Row:
    error = bound = 0.0
    equal = tokens = 0
    for prompt, answer in zip(prompts, outcome.answers, strict=True):
        whole = tuple(prompt + answer.token_ids)
        if whole not in known:
            known[whole] = reference.logits(list(whole))[len(prompt) - 1 : -1]
        for logits, token, entry in zip(known[whole], answer.token_ids, answer.logprobs, strict=True):
            allowed = TOLERANCE * float(logits.abs().max())
            tokens += 1
            equal += bool(logits[token] >= logits.max() - allowed)
            found = _error(logits, entry)
            # Of all positions, the one nearest to its bound or furthest beyond it. NaN is beyond all.
            if not found / allowed <= (error / bound if bound else 0.0):
                error, bound = found, allowed
    return Row(name, error, bound, equal, tokens, WAYS[name].shown_by(outcome))


def _error(logits: Tensor, entry: TokenLogprobs) -> float:
    expected = logits.double().log_softmax(-1)
    ids, found = zip((entry.token_id, entry.logprob), *entry.top, strict=True)
    return float((torch.tensor(found, dtype=torch.float64) - expected[list(ids)]).abs().nan_to_num(torch.inf).max())
