"""The shared state of all endpoints, made once per app."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from trio_llm.config import Config
from trio_llm.engine import Engine, Stream, open_samples
from trio_llm.engine.history import MAX_ENDED
from trio_llm.errors import InvalidRequestError, ModelNotFoundError, OverloadedError
from trio_llm.grammar import GrammarCompiler
from trio_llm.params import PoolingParams, SamplingParams, Submission
from trio_llm.server.access.auth import ApiKeys
from trio_llm.server.access.own_requests import OwnRequests
from trio_llm.server.background import Background
from trio_llm.server.bodies.size_limits import flag_of, too_much
from trio_llm.server.errors import HttpError, retry_after
from trio_llm.server.fair_threads import SHARE_OF, FairThreads
from trio_llm.server.http.edge import Lifetime
from trio_llm.server.observability.tracing import Operation, Tracing
from trio_llm.server.parsing.reasoning import ThinkingForm, thinking_form
from trio_llm.server.parsing.response_template import ResponseTemplate
from trio_llm.server.parsing.tools import ToolForm, tool_form
from trio_llm.server.templates.chat_template import ChatTemplate
from trio_llm.tokenizer import Tokenizer


@attrs.define(kw_only=True)
class Services:
    """The engine and the server's shared services.

    Attributes:
        names: Served names of the model; answers use the first one.
        template: Turns conversations into prompts; None if the model has no template.
        response_template: Reads the model's answers; None if the model has none.
        shutdown: Begins a graceful shutdown of the process; None under hypercorn's command line.
        tracing: Makes a span of every request; None if tracing is off.
        background: The tasks that run while the app serves.
        draining: The process is about to end; requests are still served for --drain-delay.
        num_requests: Requests in progress, lines of batches included.
        own_requests: The live requests and the last that ended, by their keys and ids.
        keys: The accepted API keys. With several, requests of different keys never share cached prompt blocks.
        administrators: Those of them that may do what concerns all clients; all may if there are none.
        threads: For parsing bodies, encoding and decoding tokens: work that always ends.
        rendering: For templates. One can loop forever and occupy its thread, so these threads are separate.
        compiling: For grammars, separate for the same reason.
    """

    engine: Engine
    config: Config
    names: tuple[str, ...]
    template: ChatTemplate | None
    response_template: ResponseTemplate | None = None
    shutdown: Callable[[], None] | None
    keys: ApiKeys
    background: Background
    tracing: Tracing | None = None
    threads: FairThreads = attrs.field(factory=FairThreads, init=False)
    rendering: FairThreads = attrs.field(factory=FairThreads, init=False)
    compiling: FairThreads = attrs.field(factory=FairThreads, init=False)
    grammars: GrammarCompiler = attrs.field(init=False)
    administrators: ApiKeys = attrs.field(init=False)
    own_requests: OwnRequests = attrs.field(init=False)
    _streams: set[Stream] = attrs.field(factory=set[Stream], init=False)
    num_requests: int = attrs.field(default=0, init=False)
    draining: bool = attrs.field(default=False, init=False)
    _held_tokens: int = attrs.field(default=0, init=False)
    _places: Counter[str] = attrs.field(factory=Counter[str], init=False)

    def __attrs_post_init__(self) -> None:
        info = self.engine.info
        self.administrators = ApiKeys(self.config.auth.admin_api_keys)
        self.own_requests = OwnRequests(MAX_ENDED)
        self.grammars = GrammarCompiler(
            self.tokenizer.json,
            vocab_size=max(info.vocab_size, self.tokenizer.vocab_size),
            eos_token_ids=info.eos_token_ids,
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def tool_form(self) -> ToolForm | None:
        """The form of this model's tool calls, from its template or our tool prompt; None without tools."""
        if self.template is None:
            return None
        return tool_form(self.template.tool_source) or ("hermes" if self.prompts_for_tools else None)

    @property
    def prompts_for_tools(self) -> bool:
        """Whether our own prompt describes tools, since the template does not."""
        template = self.template
        if template is None or self.declares_calls:
            return False
        return self.config.server.tool_prompt and tool_form(template.tool_source) is None

    @property
    def declares_calls(self) -> bool:
        """Whether the response template says how this model writes tool calls."""
        return self.response_template is not None and self.response_template.has_calls

    @property
    def thinking(self) -> ThinkingForm | None:
        """The form of this model's thinking, from its template and tokens; None if it does not think."""
        declared = self.response_template.thinking if self.response_template is not None else None
        return thinking_form(self._template_source, self.tokenizer.special_tokens) or declared

    @property
    def thinks(self) -> bool:
        return self.thinking is not None

    @property
    def thinking_markers(self) -> tuple[int | None, int | None]:
        """The tokens that open and close this model's thinking; None for a marker of several tokens."""
        markers = self.thinking.markers if self.thinking is not None else ("", "")
        spelled = (self.tokenizer.encode(marker, add_special_tokens=False) for marker in markers)
        first, last = (ids[0] if len(ids) == 1 else None for ids in spelled)
        return first, last

    def knows_variable(self, name: str) -> bool:
        """Return whether the template uses a variable."""
        return name in self._template_source

    @property
    def _template_source(self) -> str:
        return self.template.source if self.template is not None else ""

    def check_model(self, name: str | None) -> str:
        """Return the model's name for the answer: the requested one, else the first served name.

        Raises:
            ModelNotFoundError: No served name.
            InvalidRequestError: Missing, in strict mode.
        """
        if name is None and self.config.limits.strict:
            raise InvalidRequestError("Missing required parameter: 'model' (--strict).", param="model")
        if name is not None and name not in self.names:
            raise ModelNotFoundError(name[:200], self.names)
        return name or self.names[0]

    def cache_scope(self, key_id: str | None, cache_salt: str | None) -> bytes:
        """Return the cache salt: requests with the same salt share cached blocks."""
        key = (key_id or "") if len(self.keys) > 1 else ""
        if not key and cache_salt is None:
            return b""
        return hashlib.sha256(f"{key}/{cache_salt or ''}".encode()).digest()

    def resolve(self, submissions: Sequence[Submission]) -> list[Submission]:
        """Check submissions as `open_streams` does, without opening them; return them with final parameters."""
        params = submissions[0].params
        assert isinstance(params, SamplingParams)
        self._check_samples(len(submissions) * params.n)
        return [self.engine.resolve(submission) for submission in submissions]

    async def open_streams(
        self, lifetime: Lifetime, submissions: Sequence[Submission], operation: Operation
    ) -> list[Stream]:
        """Submit all samples of the first prompt, then of the next; all end with `lifetime`.

        `operation` is the request's name in traces. The submissions have the same sampling parameters.
        """
        params = submissions[0].params
        assert isinstance(params, SamplingParams)
        num_samples = len(submissions) * params.n
        self._check_samples(num_samples)
        self.hold(lifetime, num_samples, params.n * sum(len(one.prompt_token_ids) for one in submissions))
        streams: list[Stream] = []
        for submission in submissions:
            streams += await lifetime.stack.enter_async_context(open_samples(self.engine, submission))
        if self.tracing is not None:
            self.tracing.begin([stream.request_id for stream in streams], params, operation)
        self._streams.update(streams)
        lifetime.stack.callback(self._streams.difference_update, streams)
        lifetime.stack.callback(_count_tokens, lifetime, streams, params.n)
        return streams

    def hold(self, lifetime: Lifetime, num_places: int, count: int) -> None:
        """Count a request, its places in the engine and the tokens of its prompts for as long as it lives.

        Raises:
            HttpError: 429, its caller would have more places than one may.
            OverloadedError: Too many prompt tokens with those of other requests. A single request is never refused.
        """
        caller = SHARE_OF.get()
        if caller and self._places[caller] + num_places > self.places_per_caller:
            raise HttpError(
                429,
                f"Your requests would take more than {self.places_per_caller} of the engine's "
                f"{self.engine.max_requests} places ({flag_of('max_caller_share')}).",
                code="rate_limit_exceeded",
                headers=retry_after(1.0),
            )
        limit = self.config.limits.max_queued_tokens
        if limit and self._held_tokens and self._held_tokens + count > limit:
            raise OverloadedError(
                f"{self._held_tokens} prompt tokens wait and run: at most {limit} ({flag_of('max_queued_tokens')})."
            )
        self._count(1, count)
        lifetime.stack.callback(self._count, -1, -count)
        if caller:
            self._take_places(caller, num_places)
            lifetime.stack.callback(self._take_places, caller, -num_places)

    @property
    def places_per_caller(self) -> int:
        """Places in the engine that one caller may have."""
        return max(1, int(self.engine.max_requests * self.config.limits.max_caller_share))

    def _count(self, requests: int, tokens: int) -> None:
        self.num_requests += requests
        self._held_tokens += tokens

    def _take_places(self, caller: str, count: int) -> None:
        self._places[caller] += count
        if not self._places[caller]:
            del self._places[caller]

    def _check_samples(self, count: int) -> None:
        """Refuse more samples than a request may have: it could not be admitted, or would leave others no room."""
        if count > self.config.limits.max_samples:
            raise too_much(f"{count} samples are too many", self.config.limits.max_samples, "max_samples", "n")
        if count > (limit := self.places_per_caller):
            places = f"--max-batch-size times one more than --max-waiting-batches, times {flag_of('max_caller_share')}"
            raise InvalidRequestError(
                f"{count} samples are too many: one caller may have {limit} ({places}).", param="n"
            )

    def submitted(self, params: PoolingParams) -> Callable[[int], None]:
        """Return a callback for the id of an embedding request."""

        def begin(request_id: int) -> None:
            if self.tracing is not None:
                self.tracing.begin([request_id], params, "embeddings")

        return begin

    def last_call(self) -> None:
        """Close every open stream after the drain timeout. Its reader gets trio.ClosedResourceError."""
        for stream in self._streams:
            stream.close()


def _count_tokens(lifetime: Lifetime, streams: Sequence[Stream], samples_per_prompt: int) -> None:
    """Add the streams' tokens to `lifetime`; a prompt counts once for all its samples."""
    lifetime.num_tokens.extend(len(stream.prompt_token_ids) for stream in streams[::samples_per_prompt])
    lifetime.num_tokens.extend(stream.num_tokens for stream in streams)


def model_names(engine: Engine, config: Config) -> tuple[str, ...]:
    """Return the configured names, or the model's own."""
    return config.server.served_model_name or (Path(engine.info.name).name or engine.info.name,)
