"""From a request's prompt to token ids, off the event loop where that takes long, and within the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, cast

import trio

from trio_llm.errors import InvalidRequestError
from trio_llm.server.amounts import too_much
from trio_llm.server.requests import GenerationBody
from trio_llm.server.services import Services
from trio_llm.tokenizer import Tokenizer

T = TypeVar("T")

_MAX_BAD_WORD_TOKENS = 1024
# About 4 ms of tokenizing at the measured 2 microseconds a character: as long as anybody may hold the event loop.
_MAX_INLINE_CHARS = 2048


async def run(services: Services, work: Callable[[], T], *, chars: int) -> T:
    """Do `work`, whose time grows with `chars`, here if that is short and in a thread if not."""
    if chars <= _MAX_INLINE_CHARS:
        return work()
    return await trio.to_thread.run_sync(work, limiter=services.threads)


async def completion_prompts(services: Services, prompt: str | list[Any], body: GenerationBody) -> list[list[int]]:
    """Return the token ids of each prompt of a completion: a text, ids, or a list of either.

    Raises:
        InvalidRequestError: Not one of these, too many, empty, or too long.
    """
    items = split_prompts(prompt, "prompt", services.config.limits.max_prompts, "max_prompts")
    texts = [item for item in items if isinstance(item, str)]
    for text in texts:
        check_chars(services, text, "prompt", body)
    add_special = body.add_special_tokens is not False
    encode = services.tokenizer.encode

    def work() -> list[list[int]]:
        return [encode(i, add_special_tokens=add_special) if isinstance(i, str) else i for i in items]

    prompts = await run(services, work, chars=sum(map(len, texts)))
    return [fit(services, ids, "prompt", body) for ids in prompts]


async def bad_word_ids(services: Services, words: Sequence[str] | None) -> tuple[tuple[int, ...], ...]:
    """Spell each word with and without a space before it: tokenizers give the two different ids."""
    if not words:
        return ()
    encode = services.tokenizer.encode

    def work() -> dict[tuple[int, ...], None]:
        spellings = [text for word in words for text in (word, f" {word.lstrip()}")]
        return {tuple(encode(text, add_special_tokens=False)): None for text in spellings}

    sequences = await run(services, work, chars=2 * sum(map(len, words)))
    if sum(map(len, sequences)) > _MAX_BAD_WORD_TOKENS:
        raise InvalidRequestError(f"bad_words have more than {_MAX_BAD_WORD_TOKENS} tokens.", param="bad_words")
    return tuple(sequences)


def split_prompts(prompt: str | list[Any], what: str, most: int, setting: str) -> Sequence[str | list[int]]:
    """Return the texts and token id lists in a field that may be one of them or a list of them.

    Raises:
        InvalidRequestError: It is neither, or holds none or more than `most`, which the named setting says.
    """
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and all(_is_id(item) for item in prompt):
        return (cast("list[int]", prompt),)
    if not prompt:
        raise InvalidRequestError(f"{what} must hold at least one prompt.", param=what)
    if len(prompt) > most:
        raise too_much(f"{what}: {len(prompt)} is too many", most, setting, what)
    for item in prompt:
        if not isinstance(item, str) and not (isinstance(item, list) and all(map(_is_id, cast("list[Any]", item)))):
            raise InvalidRequestError(
                f"{what} must be a string, a list of strings, a list of token ids or a list of such lists.", param=what
            )
    return cast("list[str | list[int]]", prompt)


def _is_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def check_chars(services: Services, text: str, what: str, body: GenerationBody) -> None:
    """Refuse a text that cannot fit before the work of tokenizing it; one that is to be truncated is not refused."""
    at_least = services.tokenizer.min_tokens(text)
    if at_least > services.engine.info.max_model_len and body.truncate_prompt_tokens is None:
        _refuse_length(services, what, f"at least {at_least}")


def fit(services: Services, ids: list[int], what: str, body: GenerationBody) -> list[int]:
    """Truncate as the request asks, and refuse what is empty or leaves no room for one token of output."""
    longest = services.engine.info.max_model_len - 1
    if (keep := body.truncate_prompt_tokens) is not None:
        if keep == 0:
            raise InvalidRequestError("truncate_prompt_tokens = 0 is not allowed.", param="truncate_prompt_tokens")
        keep = longest if keep == -1 else keep
        ids = ids[:keep] if body.truncation_side == "right" else ids[-keep:]
    if not ids:
        raise InvalidRequestError(f"The {what} has no tokens: at least one is needed.", param=what)
    if len(ids) > longest:
        _refuse_length(services, what, str(len(ids)))
    return ids


def _refuse_length(services: Services, what: str, count: str) -> NoReturn:
    """Refuse in the words by which langchain, litellm and others recognise this error."""
    raise InvalidRequestError(
        f"This model's maximum context length is {services.engine.info.max_model_len} tokens. "
        f"However, your {what} resulted in {count} tokens. Please reduce the length of the {what}; "
        "one token of output needs room too.",
        param=what,
        code="context_length_exceeded",
    )


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return prompt ids as the text that a client would have sent for them."""
    return tokenizer.decode(ids, skip_special_tokens=False)


async def shown_prompts(
    services: Services, body: GenerationBody, prompts: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Return what the answer tells of each prompt: its ids and its text as the model sees it, where asked for."""
    shown: list[dict[str, Any]] = [{"prompt_token_ids": ids} if body.return_token_ids else {} for ids in prompts]
    if body.return_prompt_text:

        def decode() -> list[str]:
            return [token_texts(services.tokenizer, ids) for ids in prompts]

        texts = await run(services, decode, chars=sum(map(len, prompts)))
        shown = [{**fields, "prompt_text": text} for fields, text in zip(shown, texts, strict=True)]
    return shown
