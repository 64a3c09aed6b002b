"""Tokenize a request's prompts, off the event loop if that is slow, and check their length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from trio_llm.errors import InvalidRequestError
from trio_llm.params import check_prompt_length
from trio_llm.server.bodies.size_limits import too_much
from trio_llm.server.bodies.types import GenerationBody
from trio_llm.server.services import Services
from trio_llm.tokenizer import Tokenizer

T = TypeVar("T")

_MAX_BAD_WORD_TOKENS = 1024
# About 4 ms of tokenizing, at the measured 2 microseconds per character: the longest time to block the event loop.
MAX_INLINE_CHARS = 2048
LONG_CHARS = 50_000
"""Work on more characters counts as long (see `fair_threads`): 0.1 s of tokenizing."""


async def run(services: Services, work: Callable[[], T], *, chars: int) -> T:
    """Do `work` here if `chars`, to which its time is proportional, are few, else in a thread."""
    if chars <= MAX_INLINE_CHARS:
        return work()
    return await services.threads.run(work, is_long=chars > LONG_CHARS)


async def completion_prompts(services: Services, prompt: str | list[Any], body: GenerationBody) -> list[list[int]]:
    """Return the token ids of each prompt of a completion: a text, ids, or a list of either.

    Raises:
        InvalidRequestError: Another type, too many, empty, or too long.
    """
    items = split_prompts(prompt, "prompt", services.config.limits.max_prompts, "max_prompts")
    texts = [item for item in items if isinstance(item, str)]
    for text in texts:
        check_chars(services, text, "prompt", body)
    prompts = await encode_texts(services, items, add_special_tokens=body.add_special_tokens is not False)
    return [fit(services, ids, "prompt", body) for ids in prompts]


async def encode_texts(
    services: Services, items: Sequence[str | list[int]], *, add_special_tokens: bool
) -> list[list[int]]:
    """Return the token ids of each item, where a list is ids already."""
    encode = services.tokenizer.encode

    def work() -> list[list[int]]:
        return [encode(i, add_special_tokens=add_special_tokens) if isinstance(i, str) else i for i in items]

    # All in one call: many short texts would block the event loop as long as a long one.
    return await run(services, work, chars=sum(len(item) for item in items if isinstance(item, str)))


async def bad_word_ids(services: Services, words: Sequence[str] | None) -> tuple[tuple[int, ...], ...]:
    """Tokenize each word with and without a space before it: the ids differ."""
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


def split_prompts(prompt: str | list[Any], field: str, limit: int, setting: str) -> Sequence[str | list[int]]:
    """Return the texts and token id lists in a field that may be one of them or a list of them.

    Raises:
        InvalidRequestError: It is neither, or holds none or more than `limit`, the value of the named setting.
    """
    if isinstance(prompt, str):
        return (prompt,)
    if _are_ids(prompt):
        return (cast("list[int]", prompt),)
    if not prompt:
        raise InvalidRequestError(f"{field} must not be an empty list.", param=field)
    if len(prompt) > limit:
        raise too_much(f"{field}: {len(prompt)} is too many", limit, setting, field)
    for item in prompt:
        if (
            not isinstance(item, str)
            and item != []
            and not (isinstance(item, list) and _are_ids(cast("list[Any]", item)))
        ):
            raise InvalidRequestError(
                f"{field} must be a string, a list of strings, a list of token ids or a list of such lists.",
                param=field,
            )
    return cast("list[str | list[int]]", prompt)


def _are_ids(items: list[Any]) -> bool:
    """Return whether a list has only integers; without a Python loop, as a body can have a million."""
    return set(map(type, items)) == {int}


def check_chars(services: Services, text: str, what: str, body: GenerationBody) -> None:
    """Refuse a text that cannot fit before tokenizing it, unless the request asks for truncation."""
    if body.truncate_prompt_tokens is None:
        at_least = services.tokenizer.min_tokens(text)
        check_prompt_length(at_least, services.engine.info.max_model_len, generates=True, name=what, at_least=True)


def fit(services: Services, ids: list[int], what: str, body: GenerationBody) -> list[int]:
    """Truncate as requested, and refuse prompts that are empty or leave no room for one output token."""
    max_model_len = services.engine.info.max_model_len
    if (keep := kept_tokens(body.truncate_prompt_tokens, max_model_len - 1)) is not None:
        ids = ids[:keep] if body.truncation_side == "right" else ids[-keep:]
    check_prompt_length(len(ids), max_model_len, generates=True, name=what)
    return ids


def kept_tokens(truncate: int | None, fitting: int) -> int | None:
    """Return how many tokens `truncate_prompt_tokens` keeps, if any number: -1 stands for as many as fit.

    Raises:
        InvalidRequestError: It would keep none.
    """
    if truncate == 0:
        raise InvalidRequestError(
            "truncate_prompt_tokens = 0 is not allowed: at least 1, or -1 for as many as fit.",
            param="truncate_prompt_tokens",
        )
    return fitting if truncate == -1 else truncate


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return prompt ids as the text that a client would have sent for them."""
    return tokenizer.decode(ids, skip_special_tokens=False)


async def reported_prompts(
    services: Services, body: GenerationBody, prompts: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Return the fields of the answer about each prompt: its ids and its text, as requested."""
    reported: list[dict[str, Any]] = [{"prompt_token_ids": ids} if body.return_token_ids else {} for ids in prompts]
    if body.return_prompt_text:

        def decode() -> list[str]:
            return [token_texts(services.tokenizer, ids) for ids in prompts]

        texts = await run(services, decode, chars=sum(map(len, prompts)))
        reported = [{**fields, "prompt_text": text} for fields, text in zip(reported, texts, strict=True)]
    return reported
