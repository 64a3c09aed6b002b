"""Offline use, synchronous, in vLLM's shape: `LLM(...).generate(prompts, params)` on the same engine as the server."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from trio_llm.assemble import open_engine
from trio_llm.config import Config, EngineConfig
from trio_llm.engine.admission import check_pooling, resolve
from trio_llm.errors import ConfigError, InvalidRequestError
from trio_llm.messages import ModelInfo, PoolingParams, SamplingParams
from trio_llm.notebook.bridge import Bridge
from trio_llm.offline import EmbeddingOutput, Request, RequestOutput, Work, embed, generate, progress_bar

Prompt = str | Mapping[str, Sequence[int]]


# `Literal[...] | None` is of the older kind.
_UNIONS = (Union, UnionType)


class LLM:
    """A model in this process, for scripts and notebooks. Blocks the caller; works in every kind of cell.

    The engine lives in a thread until `close`, or the end of a `with` block; then its memory is free and another
    LLM may follow.

    Args:
        model: Directory of a checkpoint, or a hub id; default: the demo model.
        dtype: Type of weights and activations; "auto" is the checkpoint's.
        settings: Any other setting of `trio_llm.config.EngineConfig`, by its name.

    Raises:
        ConfigError: There is no such setting, or the value is none it may have.
        CheckpointError, UnsupportedError: The model cannot be loaded.
    """

    def __init__(self, model: str | None = None, *, dtype: str = "auto", **settings: Any) -> None:
        config = Config(engine=_engine_config({"model": model, "dtype": dtype, **settings}))
        self._bridge = Bridge(partial(open_engine, config))
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
        """Complete prompts, as many at a time as fit, and return the answers in the prompts' order.

        Args:
            prompts: Text, or {"prompt_token_ids": [...]}, or a list of these.
            sampling_params: For all prompts, or one per prompt; default: the model's own recommendation.
            use_tqdm: Show progress with prefill and decode tokens per second.

        Raises:
            InvalidRequestError: A prompt or parameter can never be served; nothing was started.
            RequestFailedError: The model failed on a prompt.
        """
        default = SamplingParams(**self.info.default_sampling)  # type: ignore[arg-type]
        requests = self._requests(prompts, default if sampling_params is None else sampling_params)
        for request in requests:
            resolve(request.params, request.token_ids, self._engine.limits)
        return self._run(generate, requests, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[EmbeddingOutput]:
        """Return the prompts' embeddings, in their order. Arguments and errors are those of `generate`."""
        requests = self._requests(prompts, PoolingParams() if pooling_params is None else pooling_params)
        for request in requests:
            check_pooling(request.params, request.token_ids, self._engine.limits)
        return self._run(embed, requests, use_tqdm)

    def close(self) -> None:
        """Stop the engine and free its memory; doing it again does nothing."""
        self._close_when_collected()

    def _requests(self, prompts: Prompt | Sequence[Prompt], params: Any) -> list[Request]:
        single = isinstance(prompts, str | Mapping)
        listed: Sequence[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item,arg-type]
        each = list(params) if isinstance(params, Sequence) else [params] * len(listed)
        if len(each) != len(listed):
            raise InvalidRequestError(f"{len(listed)} prompts, but {len(each)} sets of parameters.", param="params")
        return [self._request(prompt, one) for prompt, one in zip(listed, each, strict=True)]

    def _request(self, prompt: Prompt, params: Any) -> Request:
        if isinstance(prompt, str):
            return Request(prompt, tuple(self._engine.tokenizer.encode(prompt)), params)
        try:
            return Request(None, tuple(prompt["prompt_token_ids"]), params)
        except (KeyError, TypeError):
            allowed = 'text or {"prompt_token_ids": [...]}'
            raise InvalidRequestError(f"A prompt is {allowed}, not {prompt!r}.", param="prompts") from None

    def _run(self, work: Work, requests: list[Request], use_tqdm: bool) -> list[Any]:
        outputs: list[Any] = [None] * len(requests)
        with progress_bar(len(requests), use_tqdm) as show:
            for progress in self._bridge.iterate(partial(work, self._engine, requests)):
                show(progress)
                if progress.output is not None:
                    outputs[progress.index] = progress.output
        return outputs


def _engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    hints = get_type_hints(EngineConfig)
    for name, value in settings.items():
        if name not in hints:
            raise ConfigError(name, value, "LLM", f"no such setting; there are {', '.join(hints)}")
        if not _is_a(value, hints[name]):
            raise ConfigError(name, value, "LLM", f"must be {_spelled(hints[name])}")
    return EngineConfig(**settings)


def _is_a(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in _UNIONS:
        return any(_is_a(value, one) for one in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, hint)


def _spelled(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) in _UNIONS:
        return " or ".join(map(_spelled, get_args(hint)))
    return "None" if hint is type(None) else hint.__name__
