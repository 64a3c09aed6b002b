"""A real engine round a model without torch: its next letter is a function of all tokens before it."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import tokenizers
import trio
from tokenizers import decoders, models, pre_tokenizers

from tests.engine.fakes import InlineWorker
from trio_llm.config import EngineConfig
from trio_llm.engine import Engine
from trio_llm.engine.supervisor import run_engine
from trio_llm.messages import UNKNOWN, StepPlan, StepResult, TokenLogprobs
from trio_llm.model_info import KVGroup, ModelInfo
from trio_llm.params import SamplingParams
from trio_llm.tokenizer import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def stub_tokenizer(chat_template: str | None = TEMPLATE, *more_special: str) -> Tokenizer:
    """Return a tokenizer with one token per byte and three control tokens, and more at the end of its vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    inner = tokenizers.Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in (*SPECIAL, *more_special)])
    return Tokenizer(inner.to_str(), chat_template=chat_template, named_special_tokens={"eos_token": SPECIAL[0]})


TOKENIZER = stub_tokenizer()
EOS = TOKENIZER.special_tokens[SPECIAL[0]]
CLOSERS = tuple(TOKENIZER.encode('"}]'))
LETTERS = tuple(TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz "))


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    """Return the token that follows `tokens`."""
    return LETTERS[zlib.crc32(b"".join(t.to_bytes(4, "big") for t in tokens), seed % 2**32) % len(LETTERS)]


def continuation(prompt: str | Sequence[int], count: int, seed: int = 0) -> str:
    """Return the text that a fault-free run answers."""
    tokens = TOKENIZER.encode(prompt) if isinstance(prompt, str) else list(prompt)
    start = len(tokens)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
    return TOKENIZER.decode(tokens[start:])


class GatedWorker(InlineWorker):
    """Runs a step only when the test lets it: `let(n)` allows n more."""

    def __init__(self) -> None:
        self._gate = trio.Semaphore(0)
        self.open = False

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self._gate.release()

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        if any(isinstance(one, StepPlan) for one in args) and not self.open:
            await self._gate.acquire()
        return await super().run(function, *args)


class StubRunner:
    """Answers plans by `next_token`, within the grammar of a request if it has one.

    Args:
        hook: Sees each plan first, and may raise or block.
        reply: What every request is answered instead, and then the end of the text.
    """

    ranks = None

    def __init__(
        self,
        *,
        max_model_len: int = 512,
        default_sampling: dict[str, float] | None = None,
        hook: Callable[[StepPlan], Any] | None = None,
        reply: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._reply = None if reply is None else [*(tokenizer or TOKENIZER).encode(reply), EOS]
        self._matchers: dict[int, tuple[Any, int]] = {}
        self.info = ModelInfo(
            name="models/stub",
            architecture="StubForCausalLM",
            vocab_size=(tokenizer or TOKENIZER).vocab_size,
            hidden_size=4,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            kv_groups=(KVGroup(layers=(0,), block_size=16),),
            num_kv_blocks=129,
            block_bytes=1024,
            dtype="float32",
            default_sampling=default_sampling or {"temperature": 0.0},
        )
        self.hook = hook
        self.plans: list[StepPlan] = []
        self.params: dict[int, SamplingParams] = {}
        self._tokens: dict[int, list[int]] = {}

    def step(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        for request_id in plan.dropped:
            self.params.pop(request_id, None)
        for admission in plan.admitted:
            self._tokens[admission.request_id] = list(admission.token_ids)
            if isinstance(admission.params, SamplingParams):
                self.params[admission.request_id] = admission.params
                self._begin(admission.request_id, admission.params, admission.num_prompt_tokens)
        if self.hook is not None:
            self.hook(plan)
        sampled: list[tuple[int, ...]] = []
        logprobs: list[tuple[TokenLogprobs, ...] | None] = []
        prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        embeddings: dict[int, tuple[float, ...]] = {}
        at = 0
        for request_id, start, count, samples in zip(
            plan.request_ids, plan.starts, plan.counts, plan.samples, strict=True
        ):
            tokens = self._tokens[request_id]
            if plan.token_ids[at] != UNKNOWN:
                tokens[start : start + count] = plan.token_ids[at : at + count]
            at += count
            if (params := self.params.get(request_id)) is None:
                if start + count == len(tokens):
                    embeddings[request_id] = embedding(tokens)
                sampled.append(())
                logprobs.append(None)
                continue
            seed = params.seed or 0 if params.temperature else 0
            row = (self._next(request_id, tokens[: start + count], seed),) if samples else ()
            tokens[start + count :] = row or tokens[start + count :]
            if params.prompt_logprobs is not None:
                prompt_logprobs[request_id] = tuple(
                    None if i == 0 else logprob(tokens[i], params.prompt_logprobs) for i in range(start, start + count)
                )
            sampled.append(row)
            wanted = params.logprobs
            logprobs.append(None if wanted is None else tuple(logprob(token, wanted) for token in row))
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

    def _begin(self, request_id: int, params: SamplingParams, prompt_tokens: int) -> None:
        matcher = None if params.grammar is None else params.grammar.matcher()
        self._matchers[request_id] = matcher, prompt_tokens

    def _next(self, request_id: int, tokens: Sequence[int], seed: int) -> int:
        matcher, prompt_tokens = self._matchers[request_id]
        written = len(tokens) - prompt_tokens
        replies = self._reply is not None and written < len(self._reply)
        token = self._reply[written] if self._reply and replies else next_token(tokens, seed)
        if matcher is None:
            return token
        mask = np.zeros(-(-self.info.vocab_size // 32), dtype=np.int32)
        assert matcher.fill(mask.ctypes.data, mask.nbytes) is None
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        if not allowed:  # The sentence has ended: this row's result is for nobody.
            return EOS
        dice = zlib.crc32(repr(tokens[-8:]).encode(), seed % 2**32)
        closing = [i for i in CLOSERS if i in allowed]
        if EOS in allowed and token not in allowed:
            token = EOS
        elif not replies and closing and dice % 3 == 0:
            token = closing[0]  # Or strings and lists would never end.
        elif token not in allowed:
            token = allowed[dice % len(allowed)]
        matcher.consume([token])
        return token

    def close(self) -> None:
        pass


def embedding(tokens: Sequence[int]) -> tuple[float, ...]:
    """Make up a vector that tells prompts apart; exact in float32."""
    return float(len(tokens)), float(tokens[0]), float(tokens[-1]), float(sum(tokens))


def logprob(token_id: int, num_top: int) -> TokenLogprobs:
    """Make up an entry: the token itself is never among the likeliest."""
    top = tuple((LETTERS[i], -0.5 - i) for i in range(num_top))
    return TokenLogprobs(token_id, -float(token_id) / 3, num_top + 1, top)


@asynccontextmanager
async def open_stub(
    runner: StubRunner | None = None,
    tokenizer: Tokenizer = TOKENIZER,
    *,
    worker: Any = None,
    stall_after_s: float = 3600.0,
    **settings: Any,
) -> AsyncIterator[Engine]:
    """Open an engine round a stub runner. Unless a test says so, no prompt is split by how long a step took."""
    stub = StubRunner() if runner is None else runner
    config = EngineConfig(**{"target_step_s": 0.0, **settings})
    worker = InlineWorker() if worker is None else worker
    async with run_engine(
        config, lambda: stub, tokenizer, worker=worker, collector=InlineWorker(), stall_after_s=stall_after_s
    ) as engine:
        yield engine
