"""Offline use with vLLM's synchronous API: `LLM(...).generate(prompts, params)` on the same engine as the server."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, get_type_hints

import attrs

from trio_llm.assemble import open_engine
from trio_llm.bridge import Bridge
from trio_llm.config import Config, EngineConfig
from trio_llm.engine.admission import check_pooling, resolve
from trio_llm.errors import CheckpointError, ConfigError, InvalidRequestError, UnsupportedError
from trio_llm.model_info import ModelInfo
from trio_llm.offline import EmbeddingOutput, Request, RequestOutput, Work, embed, generate, progress_bar
from trio_llm.params import PoolingParams, SamplingParams, Submission, check_max_tokens
from trio_llm.replay.explanation import Explanation
from trio_llm.type_checks import is_a, spelled

if TYPE_CHECKING:
    from trio_llm.server.services import Services

Prompt = str | Mapping[str, Sequence[int]]
Message = Mapping[str, Any]
Params = TypeVar("Params", SamplingParams, PoolingParams)


class LLM:
    """A model in this process, for scripts and notebooks. Blocks the caller; works in every kind of cell.

    The engine lives in a thread until `close`, or the end of a `with` block; then its memory is free and another
    LLM may follow.

    Args:
        model: Directory of a checkpoint, or a hub id; default: the demo model.
        dtype: Type of weights and activations; "auto" is the checkpoint's.
        settings: Any other setting of `trio_llm.config.EngineConfig`, by its name.

    Raises:
        ConfigError: There is no such setting, or its value is not allowed.
        CheckpointError, UnsupportedError: The model cannot be loaded.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, *, dtype: str = "auto", **settings: Any) -> None:
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        config = Config(engine=engine_config({"model": model, "dtype": dtype, **settings}))
        self._config = config
        try:
            self._bridge = Bridge(partial(open_engine, config))
        except (CheckpointError, ConfigError, UnsupportedError) as error:
            # The message says it all; the frames of the engine's thread would hide it.
            raise error.with_traceback(None) from None
        self._engine = self._bridge.value
        self._close_when_collected = weakref.finalize(self, self._bridge.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, as many at once as fit, and return the answers in the prompts' order.

        Args:
            prompts: Text, or {"prompt_token_ids": [...]}, or a list of these.
            sampling_params: For all prompts, or one per prompt; default: the model's own recommendation.
            use_tqdm: Show progress with prefill and decode tokens per second.

        Raises:
            InvalidRequestError: A prompt or parameter is invalid; no prompt was started.
            RequestFailedError: The model failed on a prompt.
        """
        default = SamplingParams(**self.info.default_sampling)  # type: ignore[arg-type]
        requests = self._requests(prompts, default if sampling_params is None else sampling_params, SamplingParams)
        requests = [attrs.evolve(one, submission=self._with_form(one.submission)) for one in requests]
        return self._generate(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer conversations, as /v1/chat/completions does; the answers carry a `message`.

        Args:
            messages: One conversation, [{"role": "user", "content": "..."}, ...], or a list of conversations.
            sampling_params: For all conversations, or one per conversation; default: the model's own recommendation,
                and answers as long as the context allows.
            tools: Functions that the model may call, in OpenAI's form.
            tool_choice: "auto", "none", "required" or {"type": "function", "function": {"name": ...}}.
            add_generation_prompt, continue_final_message: Begin an answer, or go on with the last message.
            chat_template_kwargs: Further variables of the chat template, {"enable_thinking": False} for example.
            use_tqdm: Show progress with prefill and decode tokens per second.

        Raises:
            InvalidRequestError: The model has no chat template, or a conversation or parameter can never be served;
                nothing was started.
            RequestFailedError: The model failed on a conversation.
        """
        from trio_llm.offline_chat import prepare_chats, read_messages

        if not isinstance(messages, list | tuple | str):  # The check of a body names text.
            raise InvalidRequestError(
                f'messages is a list like [{{"role": "user", "content": "..."}}], or a list of such lists, not '
                f"{messages!r:.80}.",
                param="messages",
            )
        listed = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        default = SamplingParams(**{**self.info.default_sampling, "max_tokens": None})  # type: ignore[arg-type]
        options = {
            "tools": tools,
            "tool_choice": tool_choice,
            "add_generation_prompt": None if continue_final_message else add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": chat_template_kwargs,
        }
        params = _one_each(listed, default if sampling_params is None else sampling_params, SamplingParams)
        chats = self._bridge.call(prepare_chats, self._services, listed, params, options)
        requests = [Request(None, Submission(chat.prompt_token_ids, chat.params)) for chat in chats]
        outputs = self._generate(requests, use_tqdm)
        return [read_messages(output, chat.style) for output, chat in zip(outputs, chats, strict=True)]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[EmbeddingOutput]:
        """Return the prompts' embeddings, in their order. Arguments and errors are those of `generate`."""
        requests = self._requests(prompts, PoolingParams() if pooling_params is None else pooling_params, PoolingParams)
        for request in requests:
            check_pooling(request.submission, self._engine.limits)
        return self._run(embed, requests, use_tqdm)

    def explain(self, request_id: int) -> Explanation | None:
        """Return where the time of a sample went, by its output's `request_id`; None if it ended too long ago."""
        return self._bridge.call(self._engine.explain, request_id)

    def close(self) -> None:
        """Stop the engine and free its memory. Idempotent."""
        self._close_when_collected()
        if "_services" in self.__dict__:
            from trio_llm.offline_chat import close_services

            close_services()

    def _requests(self, prompts: Prompt | Sequence[Prompt], params: Any, kind: type[Params]) -> list[Request]:
        if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
            raise _no_prompt(prompts)
        single = isinstance(prompts, str | Mapping)
        listed: Sequence[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item,arg-type]
        return [self._request(prompt, one) for prompt, one in zip(listed, _one_each(listed, params, kind), strict=True)]

    def _request(self, prompt: Prompt, params: Any) -> Request:
        if isinstance(prompt, str):
            return Request(prompt, Submission(self._engine.tokenizer.encode(prompt), params))
        try:
            return Request(None, Submission(prompt["prompt_token_ids"], params))
        except (KeyError, TypeError):
            raise _no_prompt(prompt) from None

    @cached_property
    def _services(self) -> Services:
        """State for the server's functions, without a server."""
        from trio_llm.offline_chat import make_services

        return self._bridge.call_sync(make_services, self._engine, self._config)

    def _with_form(self, submission: Submission) -> Submission:
        params = submission.params
        if not isinstance(params, SamplingParams) or params.structured_outputs is None:
            return submission
        from trio_llm.offline_chat import compile_form

        return attrs.evolve(submission, params=self._bridge.call(compile_form, self._services, params))

    def _generate(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        for request in requests:
            resolve(request.submission, self._engine.limits)
            params = request.submission.params
            assert isinstance(params, SamplingParams)
            check_max_tokens("max_tokens", params.max_tokens, self.info.max_model_len)
            if params.n > (most := self._engine.max_requests):
                message = f"n = {params.n} is not allowed: this engine has {most} places for requests (max_batch_size)."
                raise InvalidRequestError(message, param="n")
        return self._run(generate, requests, use_tqdm)

    def _run(self, work: Work, requests: list[Request], use_tqdm: bool) -> list[Any]:
        outputs: list[Any] = [None] * len(requests)
        with progress_bar(len(requests), use_tqdm) as show:
            for progress in self._bridge.iterate(partial(work, self._engine, requests)):
                show(progress)
                if progress.output is not None:
                    outputs[progress.index] = progress.output
        return outputs


def _one_each(prompts: Sequence[Any], params: Any, kind: type[Params]) -> list[Params]:
    """Return one set of parameters per prompt.

    Raises:
        InvalidRequestError: Their number or type is wrong.
    """
    each = list(params) if isinstance(params, list | tuple) else [params] * len(prompts)
    if len(each) != len(prompts):
        raise InvalidRequestError(f"{len(prompts)} prompts, but {len(each)} sets of parameters.", param="params")
    for one in each:
        if not isinstance(one, kind):
            name = type(one).__name__
            raise InvalidRequestError(f"Parameters are {kind.__name__}(...), not {name}: {one!r:.80}.", param="params")
        check_types(one)
    return each


def check_types(params: Any, path: str = "") -> None:
    """Refuse values of other types than the parameters' annotations, at any depth."""
    for name, hint in get_type_hints(type(params)).items():
        value = getattr(params, name)
        if attrs.has(type(value)) and is_a(value, hint):
            check_types(value, f"{path}{name}.")
        elif not is_a(value, hint):
            raise InvalidRequestError(
                f"{path}{name} = {value!r:.80} is not allowed: must be {spelled(hint)}.", param=f"{path}{name}"
            )


def _no_prompt(prompt: object) -> InvalidRequestError:
    allowed = 'text or {"prompt_token_ids": [...]}'
    return InvalidRequestError(f"A prompt is {allowed}, not {prompt!r:.80}.", param="prompts")


def engine_config(settings: Mapping[str, Any], source: str = "LLM") -> EngineConfig:
    """Return checked settings. Raises ConfigError: there is no such setting, or its value is not allowed."""
    hints = get_type_hints(EngineConfig)
    for name, value in settings.items():
        if name not in hints:
            raise ConfigError(name, value, source, f"no such setting; there are {', '.join(hints)}")
        if not is_a(value, hints[name]):
            raise ConfigError(name, value, source, f"must be {spelled(hints[name])}")
    return EngineConfig(**settings)
