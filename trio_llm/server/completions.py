"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from quart import Response
from quart_trio import QuartTrio

from trio_llm.engine import Delta, Stream
from trio_llm.errors import InvalidRequestError
from trio_llm.server.body import read_body
from trio_llm.server.generation import Caller, Head, StreamUsage, UsageCounter, answer, submit
from trio_llm.server.logprobs import CompletionLogprobs, TokenNames, prompt_logprobs
from trio_llm.server.prompts import bad_word_ids, completion_prompts, shown_prompts, token_texts
from trio_llm.server.requests import CompletionBody
from trio_llm.server.sampling import check_max_tokens, sampling_params
from trio_llm.server.services import Services
from trio_llm.server.structured import compile_grammar, output_grammar

_KIND = "text_completion"
_DEFAULT_MAX_TOKENS = 16


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoint."""

    @app.post("/v1/completions")
    async def create_completion() -> Response | dict[str, Any]:
        body = await read_body(CompletionBody)
        return await complete(services, body, Caller.current())


async def complete(services: Services, body: CompletionBody, caller: Caller) -> Response | dict[str, Any]:
    """Answer a checked body."""
    head = Head.make("cmpl", services.check_model(body.model), body.request_id)
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    check_max_tokens("max_tokens", body.max_tokens, services.engine.info)
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
    if (source := output_grammar(body.response_format, body.structured_outputs)) is not None:
        params = attrs.evolve(params, grammar=await compile_grammar(services, source))
    prompts = await completion_prompts(services, body.prompt, body)
    streams = await submit(services, caller, body, prompts, params)
    echoes = [token_texts(services.tokenizer, prompt) if body.echo else "" for prompt in prompts]
    if isinstance(body.prompt, str) and body.echo and body.truncate_prompt_tokens is None:
        echoes = [body.prompt]
    names = TokenNames(services.tokenizer, as_ids=body.return_tokens_as_token_ids is True)
    shown = await shown_prompts(services, body, prompts)
    choices = [
        _Choice(index, body, stream, names, echoes[index // params.n], shown[index // params.n])
        for index, stream in enumerate(streams)
    ]
    return await answer(caller, body, streams, _Format(head, body, choices, UsageCounter(streams, params.n)))


class _Choice:
    """One sample: its prompt's echo comes with its first words."""

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
        self._logprobs = CompletionLogprobs(names)
        self._begun = False

    def take(self, delta: Delta) -> dict[str, Any]:
        """Return the choice of a chunk, or of the whole answer."""
        choice: dict[str, Any] = {
            "index": self._index,
            "text": delta.text if self._begun else self._echo + delta.text,
            "logprobs": self._columns(delta) if self._body.logprobs is not None else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        if not self._begun:
            choice |= self._prompt
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._names, self._stream.prompt_logprobs or ())
        self._begun = True
        return choice

    def _columns(self, delta: Delta) -> dict[str, Any]:
        tokens = list(zip(delta.token_ids, delta.logprobs or (), strict=True))
        if self._body.echo and not self._begun:
            echoed = zip(self._stream.prompt_token_ids, self._stream.prompt_logprobs or (), strict=True)
            tokens = [*echoed, *tokens]
        return self._logprobs.take(tokens)


class _Format:
    """OpenAI's legacy text completion."""

    def __init__(self, head: Head, body: CompletionBody, choices: Sequence[_Choice], counter: UsageCounter) -> None:
        self._head = head
        self._choices = choices
        self._counter = counter
        self._usage = StreamUsage(body, counter)

    def answer(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        for index, delta in enumerate(deltas):
            self._counter.add(index, delta)
        choices = [choice.take(delta) for choice, delta in zip(self._choices, deltas, strict=True)]
        return {**self._head.chunk(_KIND, choices), "usage": self._counter.usage()}

    def chunks(self, index: int, delta: Delta) -> Sequence[dict[str, Any]]:
        self._counter.add(index, delta)
        return (self._usage.mark(self._head.chunk(_KIND, [self._choices[index].take(delta)])),)

    def last_chunks(self) -> Sequence[dict[str, Any]]:
        return self._usage.last_chunks(self._head, _KIND)
