"""A model without torch for the engine's tests: its next token is a function of all tokens before it."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import trio

from tests.core.hash_model import HashRunner, reference
from trio_llm.config import EngineConfig
from trio_llm.engine import Engine
from trio_llm.engine.supervisor import run_engine
from trio_llm.messages import UNKNOWN, Admission, StepPlan, StepResult, TokenLogprobs
from trio_llm.model_info import KVGroup, ModelInfo
from trio_llm.params import SamplingParams

VOCAB_SIZE = 64
EOS = 63


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    """Return the token that follows `tokens`; never the end-of-sequence one."""
    return zlib.crc32(bytes(tokens), seed % 2**32) % EOS


def continuation(prompt: Sequence[int], count: int, seed: int = 0) -> tuple[int, ...]:
    """Return what a fault-free run answers."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
    return tuple(tokens[len(prompt) :])


class FakeTokenizer:
    """One letter or digit per token; the end-of-sequence token is special."""

    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .\n"
    vocab_size = VOCAB_SIZE

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join("" if i == EOS and skip_special_tokens else self.alphabet[i] for i in token_ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self.alphabet.index(letter) for letter in text]


class StubRunner:
    """Answers plans by `next_token`, at once. Hooks see each plan first and may raise, block or record.

    Greedy requests ignore their seed; with a temperature, another seed gives another answer.
    """

    ranks: Any = None

    def __init__(
        self, *, num_kv_blocks: int = 65, max_model_len: int = 512, hook: Callable[[StepPlan], Any] | None = None
    ) -> None:
        self.info = ModelInfo(
            name="stub",
            architecture="StubForCausalLM",
            vocab_size=VOCAB_SIZE,
            hidden_size=4,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            kv_groups=(KVGroup(layers=(0,), block_size=16),),
            num_kv_blocks=num_kv_blocks,
            block_bytes=1024,
            dtype="float32",
        )
        self.hook = hook
        self.plans: list[StepPlan] = []
        self.closed = False
        self.admissions: dict[int, Admission] = {}
        self.tokens: dict[int, list[int]] = {}

    def step(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        for request_id in plan.dropped:
            self.admissions.pop(request_id, None)
            self.tokens.pop(request_id, None)
        for admission in plan.admitted:
            self.admissions[admission.request_id] = admission
            self.tokens[admission.request_id] = list(admission.token_ids)
        if self.hook is not None:
            self.hook(plan)
        sampled: list[tuple[int, ...]] = []
        logprobs: list[tuple[TokenLogprobs, ...] | None] = []
        prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        embeddings: dict[int, tuple[float, ...]] = {}
        at = 0
        columns = zip(plan.request_ids, plan.starts, plan.counts, plan.samples, strict=True)
        for request_id, start, count, samples in columns:
            tokens, params = self.tokens[request_id], self.admissions[request_id].params
            if plan.token_ids[at] != UNKNOWN:
                tokens[start : start + count] = plan.token_ids[at : at + count]
            at += count
            row: tuple[int, ...] = ()
            if isinstance(params, SamplingParams):
                if samples:
                    row = (next_token(tokens[: start + count], params.seed or 0 if params.temperature else 0),)
                    tokens[start + count :] = row
                if params.prompt_logprobs is not None:
                    entries = [None if i == 0 else _logprob(tokens[i]) for i in range(start, start + count)]
                    prompt_logprobs[request_id] = tuple(entries)
            elif samples:
                embeddings[request_id] = (1.0, 0.0, 0.0, float(len(tokens)))
            sampled.append(row)
            wants = isinstance(params, SamplingParams) and params.logprobs is not None
            logprobs.append(tuple(map(_logprob, row)) if wants else None)
        return StepResult(
            plan.step,
            tuple(sampled),
            logprobs=tuple(logprobs) if any(logprobs) else None,
            prompt_logprobs=prompt_logprobs or None,
            embeddings=embeddings or None,
        )

    def launch(self, plan: StepPlan, begun: Callable[[], None]) -> Callable[[], StepResult]:
        """Run a plan at once; its result is known."""
        begun()
        result = self.step(plan)
        return lambda: result

    def close(self) -> None:
        self.closed = True


def _logprob(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -float(token_id), 1, ((token_id, -float(token_id)),))


class InlineWorker:
    """Runs the model's calls in the event loop's own thread, so that a mock clock sees everything."""

    def post(self, function: Callable[..., Any], *args: Any) -> Callable[[], Awaitable[Any]]:
        """Return what runs the call when somebody waits for it."""
        return partial(self.run, function, *args)

    def start(self, function: Callable[..., Any], *args: Any) -> Callable[[], Awaitable[Any]]:
        """Post a call. It cannot begin before somebody waits for it."""
        return self.post(function, lambda: None, *args)

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)

    def close(self) -> None:
        pass


@asynccontextmanager
async def open_stub(
    runner: StubRunner | None = None, *, worker: Any = None, stall_after_s: float = 60.0, **settings: Any
) -> AsyncIterator[Engine]:
    """Open an engine round a stub runner."""
    runner = StubRunner() if runner is None else runner
    config = EngineConfig(**settings)
    tokenizer: Any = FakeTokenizer()
    worker = InlineWorker() if worker is None else worker
    async with run_engine(
        config, lambda: runner, tokenizer, worker=worker, collector=InlineWorker(), stall_after_s=stall_after_s
    ) as engine:
        yield engine


class HashStub(StubRunner):
    """The exact oracle behind the engine: it reads every token back through the block tables and checks each slot."""

    def __init__(self, *, num_kv_blocks: int = 65, hook: Callable[[StepPlan], Any] | None = None) -> None:
        super().__init__(num_kv_blocks=num_kv_blocks, hook=hook)
        self.model = HashRunner(self.info.kv_groups, num_kv_blocks, VOCAB_SIZE, defaultdict(bytes))

    def step(self, plan: StepPlan) -> StepResult:
        if self.hook is not None:
            self.hook(plan)
        # The oracle is strict, and drops once only; a plan that is run in halves names its drops in each.
        dropped = tuple(request_id for request_id in plan.dropped if request_id in self.model.known)
        return self.model.step(attrs.evolve(plan, dropped=dropped))

    def answer(self, prompt: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """Return what a request answers that has the machine to itself."""
        return tuple(reference(prompt, params, self.info.kv_groups, VOCAB_SIZE, (EOS,), self.info.max_model_len))
