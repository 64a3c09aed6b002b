"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from msgspec import UNSET
from quart import Response
from quart_trio import QuartTrio

from trio_llm.engine import Delta, Stream
from trio_llm.errors import InvalidRequestError
from trio_llm.params import SamplingParams, check_max_tokens
from trio_llm.server.answers.completions import Completion, CompletionChoice, CompletionColumns
from trio_llm.server.bodies.request_body import read_body
from trio_llm.server.bodies.types import CompletionBody
from trio_llm.server.constraints.response_format import compile_grammar, requested_form
from trio_llm.server.generation.prompts import bad_word_ids, completion_prompts, reported_prompts, token_texts
from trio_llm.server.generation.respond import Caller, Head, StreamUsage, UsageCounter, answer, is_large, submit
from trio_llm.server.generation.sampling_params import sampling_params
from trio_llm.server.generation.timings import prompt_progress, timings
from trio_llm.server.http.sse import AnswerFormat
from trio_llm.server.openai.logprobs import CompletionLogprobs, TokenNames, prompt_logprobs
from trio_llm.server.services import Services

_DEFAULT_MAX_TOKENS = 16


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoint."""

    @app.post("/v1/completions")
    async def create_completion() -> Response:
        body = await read_body(CompletionBody)
        return await complete(services, body, Caller.current())


async def prepare_completion(services: Services, body: CompletionBody) -> tuple[list[list[int]], SamplingParams]:
    """Return the token ids of the prompts of a checked body, and the parameters of their answers."""
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    check_max_tokens("max_tokens", body.max_tokens, services.engine.info.max_model_len)
    if max_tokens == 0 and not body.echo:
        raise InvalidRequestError("max_tokens = 0 is allowed only with echo, to score a prompt.", param="max_tokens")
    params = sampling_params(
        body,
        info=services.engine.info,
        bad_words=await bad_word_ids(services, body.bad_words),
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs,
    )
    if (source := await requested_form(services, body)) is not None:
        params = attrs.evolve(params, grammar=await compile_grammar(services, source))
    return await completion_prompts(services, body.prompt, body), params


async def complete(services: Services, body: CompletionBody, caller: Caller) -> Any:
    """Answer a checked body, by a response or as the caller encodes answers."""
    head = Head.make("cmpl", services.check_model(body.model), body.request_id)
    prompts, params = await prepare_completion(services, body)
    streams = await submit(services, caller, body, prompts, params, head.id)
    echoes = [token_texts(services.tokenizer, prompt) if body.echo else "" for prompt in prompts]
    if isinstance(body.prompt, str) and body.echo and body.truncate_prompt_tokens is None:
        echoes = [body.prompt]
    names = TokenNames(services.tokenizer, as_ids=body.return_tokens_as_token_ids is True)
    reported = await reported_prompts(services, body, prompts)
    choices = [
        _Choice(index, body, stream, names, echoes[index // params.n], reported[index // params.n])
        for index, stream in enumerate(streams)
    ]
    form = _Format(head, body, choices, UsageCounter(streams, params.n))
    interval = body.stream_interval or 1
    return await answer(services, caller, streams, form, streamed=body.stream is True, interval=interval)


class _Choice:
    """One sample. Its first chunk begins with the echo of its prompt."""

    def __init__(
        self,
        index: int,
        body: CompletionBody,
        stream: Stream,
        names: TokenNames,
        echo: str,
        prompt: Mapping[str, Any],
    ) -> None:
        self._index = index
        self._body = body
        self._stream = stream
        self._names = names
        self._echo = echo
        self._prompt = prompt
        self._logprobs = CompletionLogprobs(names, shows_special=body.skip_special_tokens is False)
        self._text_chars = 0
        self._begun = False

    def take(self, delta: Delta) -> CompletionChoice:
        """Return the choice of a chunk, or of the whole answer."""
        text = delta.text if self._begun else self._echo + delta.text
        self._text_chars += len(text)
        choice = CompletionChoice(
            index=self._index,
            text=text,
            logprobs=self._columns(delta) if self._body.logprobs is not None else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=list(delta.token_ids) if self._body.return_token_ids else UNSET,
            **({} if self._begun else self._prompt),
        )
        if self._body.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(self._names, self._stream.prompt_logprobs or ())
        self._begun = True
        return choice

    @property
    def is_large(self) -> bool:
        """Whether the next chunk has the log-probabilities of a long prompt."""
        echoes = self._body.echo and self._body.logprobs is not None and not self._begun
        return echoes is True and is_large(self._stream.prompt_logprobs or ())

    def _columns(self, delta: Delta) -> CompletionColumns:
        tokens = list(zip(delta.token_ids, delta.logprobs or (), strict=True))
        if self._body.echo and not self._begun:
            prompt = self._stream.prompt_token_ids
            # Of a prompt that was cancelled before it was computed, there are none.
            echoed = zip(prompt, self._stream.prompt_logprobs or (None,) * len(prompt), strict=True)
            tokens = [*echoed, *tokens]
        return self._logprobs.take(tokens, text_chars=self._text_chars if delta.finish_reason is not None else None)


class _Format(AnswerFormat):
    """OpenAI's legacy text completion."""

    def __init__(self, head: Head, body: CompletionBody, choices: Sequence[_Choice], counter: UsageCounter) -> None:
        self._head = head
        self._choices = choices
        self._counter = counter
        self._usage = StreamUsage(body, counter)
        self._times = body.timings_per_token is True

    def answer(self, deltas: Sequence[Delta]) -> Completion:
        for index, delta in enumerate(deltas):
            self._counter.add(index, delta)
        choices = [choice.take(delta) for choice, delta in zip(self._choices, deltas, strict=True)]
        usage = self._counter.usage()
        whole = Completion(**self._head.fields, choices=choices, usage=usage)
        if self._times:
            whole.timings = timings(self._counter.streams, usage)
        return whole

    def chunks(self, index: int, delta: Delta) -> Sequence[Completion]:
        if delta.progress is not None:
            progress = prompt_progress(self._counter.streams[index], delta.progress)
            choice = CompletionChoice(index=index, text="", logprobs=None, finish_reason=None, stop_reason=None)
            return [Completion(**self._head.fields, choices=[choice], prompt_progress=progress)]
        self._counter.add(index, delta)
        return [self._usage.mark(Completion(**self._head.fields, choices=[self._choices[index].take(delta)]))]

    def is_large(self, index: int) -> bool:
        return self._choices[index].is_large

    def last_chunks(self) -> Sequence[Completion]:
        return self._usage.last_chunks(self._head, Completion)
