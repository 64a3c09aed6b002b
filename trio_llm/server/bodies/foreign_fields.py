"""Top-level fields of other servers: those that are refused, and hints that are accepted without effect."""

from __future__ import annotations

from functools import cache

import msgspec
from msgspec import Struct

from trio_llm.server.bodies.types import ChatBody
from trio_llm.server.bodies.unknown_fields import Neutral, hints, not_supported

# These would change the answer: refused by name, except with their neutral values.
_NOT_SUPPORTED: Neutral = {
    "functions": (),
    "function_call": ("none",),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
    "documents": (),
    "chat_template": (),
    "thinking_token_budget": (),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "store": (False,),
    "prompt_embeds": (),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "kv_transfer_params": (),
    "vllm_xargs": (),
}

# These only hint at how to produce the answer: accepted, and named in a Warning unless their value is neutral.
_HINTS: Neutral = {
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "web_search_options": (),
}


@cache
def hinted_fields(kind: type[Struct]) -> Neutral:
    """Return the top-level fields that a type of body accepts without effect."""
    return {**_HINTS, **hints(kind)}


@cache
def unsupported_fields(kind: type[Struct]) -> Neutral:
    """Return the top-level fields that a type of body refuses.

    The bodies of /v1/messages and /v1/responses list theirs in `not_supported`; they refuse those of a chat too.
    """
    own = not_supported(kind)
    if not own:
        return _NOT_SUPPORTED
    chat = dict.fromkeys((field.name for field in msgspec.structs.fields(ChatBody)), ())
    refused = {**_NOT_SUPPORTED, **chat, **own}
    return {name: neutral for name, neutral in refused.items() if name not in hints(kind)}
