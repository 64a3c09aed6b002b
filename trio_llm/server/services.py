"""What every endpoint works with, made once per app."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import trio

from trio_llm.config import Config
from trio_llm.engine import Engine, Stream, open_samples
from trio_llm.errors import InvalidRequestError, ModelNotFoundError, OverloadedError
from trio_llm.grammar import GrammarCompiler
from trio_llm.messages import PoolingParams, SamplingParams
from trio_llm.server.amounts import flag_of, too_much
from trio_llm.server.auth import ApiKeys
from trio_llm.server.chat_template import ChatTemplate
from trio_llm.server.edge import Lifetime
from trio_llm.server.parsing.reasoning import CLOSE, OPEN
from trio_llm.server.parsing.tools import ToolForm, tool_form
from trio_llm.server.tracing import Operation, Tracing
from trio_llm.tokenizer import Tokenizer

# A number pulled out of the air: two long prompts are tokenized side by side, the others wait their turn.
_TOKENIZING_THREADS = 2
_COMPILING_THREADS = 2


@attrs.define(kw_only=True)
class Services:
    """The engine and what surrounds it.

    Attributes:
        names: What the model answers to, the first one in answers.
        template: Turns conversations into prompts; None if the model has no template.
        shutdown: Begins an orderly end of the process; None where that is somebody else's to decide.
        tracing: Told of every request; None where nobody wants to know.
        num_requests: Requests under way, those of batches among them.
        keys: The accepted API keys. With several, requests of different keys never share cached prompt blocks.
    """

    engine: Engine
    config: Config
    names: tuple[str, ...]
    template: ChatTemplate | None
    shutdown: Callable[[], None] | None
    keys: ApiKeys
    tracing: Tracing | None = None
    threads: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(_TOKENIZING_THREADS))
    compiling: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(_COMPILING_THREADS))
    grammars: GrammarCompiler = attrs.field(init=False)
    _streams: set[Stream] = attrs.field(factory=set[Stream], init=False)
    num_requests: int = attrs.field(default=0, init=False)
    _held_tokens: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        info = self.engine.info
        self.grammars = GrammarCompiler(
            self.tokenizer.json, vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def tool_form(self) -> ToolForm | None:
        """How this model writes tool calls, as its template tells."""
        return tool_form(self._template_source)

    @property
    def thinks(self) -> bool:
        """Whether this model may think before it answers, as its template tells."""
        return CLOSE in self._template_source

    @property
    def thinking_markers(self) -> tuple[int | None, int | None]:
        """The tokens that open and close this model's thinking; None for one that is spelled in several."""
        spelled = (self.tokenizer.encode(marker, add_special_tokens=False) for marker in (OPEN, CLOSE))
        first, last = (ids[0] if len(ids) == 1 else None for ids in spelled)
        return first, last

    def knows_variable(self, name: str) -> bool:
        """Say whether the template looks at a variable."""
        return name in self._template_source

    @property
    def _template_source(self) -> str:
        return self.template.source if self.template is not None else ""

    def check_model(self, name: str | None) -> str:
        """Return the name to answer with. Raises ModelNotFoundError for a model that is not served."""
        if name is not None and name not in self.names:
            raise ModelNotFoundError(name[:200], self.names)
        return name or self.names[0]

    def cache_scope(self, key_id: str | None, cache_salt: str | None) -> bytes:
        """Return the salt within which a request shares cached blocks."""
        key = (key_id or "") if len(self.keys) > 1 else ""
        if not key and cache_salt is None:
            return b""
        return hashlib.sha256(f"{key}/{cache_salt or ''}".encode()).digest()

    async def open_streams(
        self,
        lifetime: Lifetime,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        priority: int,
        salt: bytes,
        background: bool = False,
        operation: Operation,
    ) -> list[Stream]:
        """Submit every sample of every prompt, sample by sample within a prompt; all end with `lifetime`.

        `operation` is what the request is called in traces.
        """
        self._check_samples(len(prompts) * params.n)
        self.hold(lifetime, params.n * sum(map(len, prompts)))
        streams: list[Stream] = []
        for prompt in prompts:
            samples = open_samples(self.engine, prompt, params, priority=priority, salt=salt, background=background)
            streams += await lifetime.stack.enter_async_context(samples)
        if self.tracing is not None:
            self.tracing.begin([stream.request_id for stream in streams], params, operation)
        self._streams.update(streams)
        lifetime.stack.callback(self._streams.difference_update, streams)
        lifetime.stack.callback(_count_tokens, lifetime, streams, params.n)
        return streams

    def hold(self, lifetime: Lifetime, count: int) -> None:
        """Count a request and the tokens of its prompts for as long as it lives.

        Raises:
            OverloadedError: There are too many with those of all others. A request that is alone is never refused.
        """
        most = self.config.limits.max_queued_tokens
        if most and self._held_tokens and self._held_tokens + count > most:
            raise OverloadedError(
                f"{self._held_tokens} prompt tokens wait and run: at most {most} ({flag_of('max_queued_tokens')})."
            )
        self._count(1, count)
        lifetime.stack.callback(self._count, -1, -count)

    def _count(self, requests: int, tokens: int) -> None:
        self.num_requests += requests
        self._held_tokens += tokens

    def _check_samples(self, count: int) -> None:
        """Refuse more samples than a request may have; those beyond the engine's places would never be admitted."""
        if count > self.config.limits.max_samples:
            raise too_much(f"{count} samples are too many", self.config.limits.max_samples, "max_samples", "n")
        if count > self.engine.max_requests:
            places = "--max-batch-size times one more than --max-waiting-batches"
            raise InvalidRequestError(
                f"{count} samples are too many: there are {self.engine.max_requests} places ({places}).", param="n"
            )

    def submitted(self, params: PoolingParams) -> Callable[[int], None]:
        """Return what is to be called with the number of a request for a vector."""

        def begin(request_id: int) -> None:
            if self.tracing is not None:
                self.tracing.begin([request_id], params, "embeddings")

        return begin

    def last_call(self) -> None:
        """End every open stream: the time to drain is over. Its reader gets trio.ClosedResourceError."""
        for stream in self._streams:
            stream.close()


def _count_tokens(lifetime: Lifetime, streams: Sequence[Stream], samples_per_prompt: int) -> None:
    """Add what streams have cost; a prompt counts once, however many samples it has."""
    lifetime.num_tokens.extend(len(stream.prompt_token_ids) for stream in streams[::samples_per_prompt])
    lifetime.num_tokens.extend(stream.num_tokens for stream in streams)


def model_names(engine: Engine, config: Config) -> tuple[str, ...]:
    """Return the configured names, or the model's own."""
    return config.server.served_model_name or (Path(engine.info.name).name or engine.info.name,)
