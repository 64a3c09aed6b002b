"""Render a conversation with the model's Jinja template, in a separate process.

The template comes from the model's directory, never from a request. Text of users cannot become a control token: see
`provenance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from trio_llm.config import LimitsConfig
from trio_llm.errors import CheckpointError, InvalidRequestError
from trio_llm.server.bodies.size_limits import flag_of
from trio_llm.server.children.pool import ChildCrashError, ChildTimeoutError
from trio_llm.server.templates.render_pool import RenderPool, shared_pool

# Variables from the server, Jinja and transformers.
_RESERVED = frozenset(
    "messages tools documents add_generation_prompt continue_final_message chat_template tokenize raise_exception "
    "strftime_now range dict lipsum cycler joiner namespace self loop caller varargs kwargs".split()
)
# Guesses: real templates compile in milliseconds and render within a few megabytes.
_COMPILE_CPU_S = 10.0
_MEMORY_BYTES = 256 << 20
_MEMORY_BYTES_PER_CHAR = 64


class ChatTemplate:
    """A template, checked.

    Args:
        source: Jinja, in the dialect of transformers' `chat_template_utils`.
        named_special_tokens: "bos_token" and others, as the template's variables.
        limits: Limits on time and length of a rendering.
        tool_source: Another template for conversations with tools; default: the same.
        pool: The processes that render; default: the shared pool.

    Raises:
        CheckpointError: The template cannot be parsed.
    """

    def __init__(
        self,
        source: str,
        named_special_tokens: Mapping[str, str],
        limits: LimitsConfig,
        *,
        tool_source: str | None = None,
        pool: RenderPool | None = None,
    ) -> None:
        self.source = source
        self.tool_source = source if tool_source is None else tool_source
        self._tokens = dict(named_special_tokens)
        self._limits = limits
        self._pool = shared_pool() if pool is None else pool
        self._memory_bytes = _MEMORY_BYTES + _MEMORY_BYTES_PER_CHAR * limits.max_template_chars
        for each in {self.source, self.tool_source}:
            self._check(each)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> list[tuple[str, bool]]:
        """Render a conversation as segments of (text, trusted) for `Tokenizer.encode_segments`.

        Blocks while the template runs; call it in a thread.

        Args:
            messages: With "role", "content" (text) and further keys of the template.
            tools: Tools in OpenAI's format; None for none.
            documents: Documents for the model; None for none.
            add_generation_prompt: End with the opening of the assistant's turn.
            continue_final_message: End inside the last message instead of after it.
            variables: Further variables for the template.

        Raises:
            InvalidRequestError: The template refuses the conversation, or needs too much time, memory or text.
        """
        for name in variables:
            if name in _RESERVED or name in self._tokens:
                raise InvalidRequestError(f"chat_template_kwargs must not set {name!r}.", param="chat_template_kwargs")
        source = self.source if tools is None else self.tool_source
        result = self._run(
            {
                "source": source,
                "messages": [_with_known_role(message, source) for message in messages],
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "variables": variables,
                "tokens": self._tokens,
                "max_chars": self._limits.max_template_chars,
            }
        )
        return [(text, trusted) for text, trusted in result["segments"]]

    def _check(self, source: str) -> None:
        """Compile once at startup, where an error is the model's and not a request's."""
        try:
            result = self._pool.run({"source": source}, cpu_s=_COMPILE_CPU_S, memory_bytes=self._memory_bytes)
        except ChildTimeoutError:
            raise CheckpointError(f"The chat template takes longer than {_COMPILE_CPU_S:g} s to parse") from None
        except ChildCrashError:
            raise CheckpointError("The chat template cannot be parsed: it ended the process that tried") from None
        if "error" in result:
            reason = result.get("reason") or "it is too large or nested too deeply"
            raise CheckpointError(f"The chat template cannot be parsed: {reason}")

    def _run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        limits = self._limits
        try:
            result = self._pool.run(job, cpu_s=limits.template_timeout_s, memory_bytes=self._memory_bytes)
        except ChildTimeoutError:
            _refuse(f"it takes longer than {limits.template_timeout_s:g} s ({flag_of('template_timeout_s')})")
        except ChildCrashError:
            _refuse("it ended the process that renders it")
        except (RecursionError, ValueError) as error:
            _refuse(f"it cannot be written as JSON: {error}")
        if "error" in result:
            most = f"{limits.max_template_chars} characters ({flag_of('max_template_chars')})"
            reasons = {
                "too_long": f"its output is too long, more than {most}",
                "no_final": "it does not show the final message, which is to be continued",
                "memory": f"it needs more than {self._memory_bytes >> 20} MiB",
                "recursion": "it calls itself too often",
            }
            _refuse(reasons.get(result["error"]) or result["reason"].rstrip("."))
        return result


def _with_known_role(message: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    if message["role"] == "developer" and "developer" not in source:
        return {**message, "role": "system"}
    return message


def _refuse(reason: str) -> NoReturn:
    message = f"The model's chat template refuses this conversation: {reason}."
    raise InvalidRequestError(message, param="messages")
