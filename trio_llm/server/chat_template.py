"""A conversation as a prompt: the model's own Jinja template, sandboxed, with the users' text kept text.

The template comes from the model's directory; it is never taken from a request. What the users wrote must not be
able to spell control tokens (`<|im_end|>` in a message would end the turn), so their literals are masked before
rendering and unmasked into segments that the tokenizer reads as plain text.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from trio_llm.config import LimitsConfig
from trio_llm.errors import CheckpointError, InvalidRequestError
from trio_llm.server.amounts import flag_of

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"})


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja, in the dialect of transformers' `chat_template_utils`.
        named_special_tokens: "bos_token" and others, as the template's variables.
        special_tokens: Every literal that the tokenizer reads as a control token.
        limits: How long a rendering may take, and how long it may be.
    """

    def __init__(
        self,
        source: str,
        named_special_tokens: Mapping[str, str],
        special_tokens: Iterable[str],
        limits: LimitsConfig,
    ) -> None:
        try:
            self._template = _Environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"The chat template cannot be parsed: {error}") from None
        self.source = source
        self._limits = limits
        self._tokens = dict(named_special_tokens)
        self._mask = _Mask(special_tokens)
        self._knows_developer = "developer" in source

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

        Blocks for as long as the template takes, at most about the limit; call it in a thread.

        Args:
            messages: With "role", "content" (text) and what else the template knows.
            tools: What the model may call, as OpenAI defines tools; None for none.
            documents: What the model may look things up in; None for nothing.
            add_generation_prompt: End with the opening of the assistant's turn.
            continue_final_message: End inside the last message instead of after it.
            variables: Further ones for the template.

        Raises:
            InvalidRequestError: The template refuses the conversation, or takes too long, or says too much.
        """
        for name in variables:
            if name in _RESERVED or name in self._tokens:
                raise InvalidRequestError(f"chat_template_kwargs must not set {name!r}.", param="chat_template_kwargs")
        masking = self._mask.begin()
        masked = [masking.hide(dict(message)) for message in messages]
        if not self._knows_developer:
            masked = [
                {**message, "role": "system"} if message["role"] == "developer" else message for message in masked
            ]
        if continue_final_message:
            masked[-1]["content"] = (masked[-1].get("content") or "") + masking.end
        text = self._run(
            messages=masked,
            tools=None if tools is None else masking.hide(list(tools)),
            documents=None if documents is None else masking.hide(list(documents)),
            add_generation_prompt=add_generation_prompt,
            **self._tokens,
            **masking.hide(dict(variables)),
        )
        return masking.reveal(_cut(text, masking.end) if continue_final_message else text)

    def _run(self, **variables: Any) -> str:
        deadline = time.monotonic() + self._limits.template_timeout_s
        pieces: list[str] = []
        chars = 0
        try:
            for piece in self._template.generate(**variables):
                pieces.append(piece)
                chars += len(piece)
                if chars > (most := self._limits.max_template_chars):
                    _refuse(f"its output is too long, more than {most} characters ({flag_of('max_template_chars')})")
                if time.monotonic() > deadline:
                    raise too_slow(self._limits)
        except (RecursionError, MemoryError, OverflowError):
            _refuse("it needs too much")
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            _refuse(str(error)[:500])
        return "".join(pieces)


def too_slow(limits: LimitsConfig) -> InvalidRequestError:
    """Return the refusal of a conversation whose rendering takes longer than it may."""
    return _refusal(f"it takes longer than {limits.template_timeout_s:g} s ({flag_of('template_timeout_s')})")


def _refusal(reason: str) -> InvalidRequestError:
    message = f"The model's chat template refuses this conversation: {reason}."
    return InvalidRequestError(message, param="messages")


def _refuse(reason: str) -> NoReturn:
    raise _refusal(reason)


def _cut(text: str, end: str) -> str:
    """Cut behind the final message; a template that trims it also trims what is to be continued."""
    head, found, _ = text.rpartition(end)
    if not found:
        _refuse("it does not show the final message, which is to be continued")
    return head


class _Mask:
    """Finds the literals of control tokens in text, also one that the text only begins and its end completes."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        literals = sorted(special_tokens, key=len, reverse=True)
        # The template may put two users' texts side by side, trimmed: a beginning at the very end counts as well.
        beginnings = sorted({t[:n] for t in literals for n in range(1, len(t))}, key=len, reverse=True)
        whole = "|".join(map(re.escape, literals)) or r"(?!)"
        begun = "|".join(map(re.escape, beginnings)) or r"(?!)"
        self.pattern = re.compile(rf"{whole}|(?:{begun})(?=\s*\Z)")

    def begin(self) -> _Masking:
        return _Masking(self.pattern)


class _Masking:
    """The masks of one rendering. Their names are drawn, so that no user can spell one."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern
        # Private-use characters and digits: no template changes their case, trims or splits them.
        self._nonce = f"\uf8ff{secrets.randbelow(10**18):018d}"
        self._hidden: list[str] = []
        self.end = f"{self._nonce}\uf8fe"

    def hide(self, value: Any) -> Any:
        """Return `value` with every literal in its strings, at any depth, replaced by a mask."""
        if isinstance(value, str):
            return self._pattern.sub(self._mask, value)
        if isinstance(value, dict):
            return {key: self.hide(item) for key, item in cast("dict[str, Any]", value).items()}
        if isinstance(value, list):
            return [self.hide(item) for item in cast("list[Any]", value)]
        return value

    def _mask(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._nonce}{len(self._hidden) - 1}\uf8fe"

    def reveal(self, text: str) -> list[tuple[str, bool]]:
        """Split rendered text into what the template may say and what users said."""
        segments: list[tuple[str, bool]] = []
        for index, piece in enumerate(re.split(rf"{self._nonce}([0-9]+)\uf8fe", text)):
            segments.append((self._hidden[int(piece)], False) if index % 2 else (piece, True))
        return segments


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's words for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox as transformers sets it up. It is no limit on time or memory; `ChatTemplate.render` is."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        untyped: Any = self
        untyped.filters["tojson"] = _tojson
        untyped.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002
        """Multiply numbers only: a text times a billion is a gigabyte in one expression."""
        if operator == "**" or not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise jinja2.TemplateRuntimeError(f"{operator} is for numbers")
        return left * right


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return dt.datetime.now().strftime(form)  # noqa: DTZ005 - the date that models are told is the local one
