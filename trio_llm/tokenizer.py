"""Text to token ids and back, from a model directory's tokenizer.json; knows no model, no server and no torch.

The tokenizers library is loaded on first use. What it does with hostile input is contained here: its panics
(a BaseException that would pass every `except Exception` and tear down a nursery) become InvalidRequestError,
ids it would overflow on are refused, and text that must not be read as control tokens goes through a second
instance that spells them out as ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trio_llm.errors import CheckpointError, InvalidRequestError

if TYPE_CHECKING:
    import tokenizers

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """A tokenizer.json with the chat template and special tokens that stand beside it.

    Attributes:
        json: The text of tokenizer.json.
        vocab_size: One past the largest id that has a token.
        special_tokens: Literal -> id of the control tokens.
        named_special_tokens: "bos_token", "eos_token", ... -> literal, as far as the model names them.
        chat_template: Jinja source, None if the model has none.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        chat_template: str | None = None,
        named_special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.json = tokenizer_json
        self._tokenizer = _parse(tokenizer_json)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_tokens: Mapping[str, int] = {t.content: i for i, t in added.items() if t.special}
        self.named_special_tokens: Mapping[str, str] = dict(named_special_tokens or {})
        self.chat_template = chat_template
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = 1 + max(ids, default=-1)

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a model directory.

        Raises:
            CheckpointError: A file is missing or cannot be parsed; the message names it.
        """
        directory = Path(path)
        config = _read_json(directory / "tokenizer_config.json")
        return cls(
            _read_text(directory / "tokenizer.json"),
            chat_template=_chat_template(directory, config),
            named_special_tokens=_named_special_tokens(directory, config),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True) -> list[int]:
        """Tokenize `text`.

        Args:
            text: Any Unicode text.
            add_special_tokens: Add what the model puts round a prompt (for example a BOS).
            allow_special: Read the literal of a control token as that token; False reads it as plain text.

        Raises:
            InvalidRequestError: The text is not valid Unicode, or the tokenizer cannot handle it.
        """
        tokenizer = self._tokenizer if allow_special else self._literal_tokenizer
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"The text is not valid Unicode: {error.reason}.") from None
        with _contained(InvalidRequestError, "The tokenizer cannot encode this text"):
            # As a batch of one: alone, it would hold the GIL, and with it the event loop, for seconds if it is long.
            return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Tokenize a text of which only some parts may name control tokens.

        Control tokens are looked for in the trusted segments alone; what lies between two of them is tokenized in
        one piece, so that the result is that of `encode` wherever no untrusted segment spells a control token.

        Args:
            segments: (text, trusted), in order.
        """
        ids: list[int] = []
        plain: list[str] = []

        def flush() -> None:
            if plain:
                ids.extend(self.encode("".join(plain), add_special_tokens=False, allow_special=False))
                plain.clear()

        for text, trusted in segments:
            for piece in self._special_pattern.split(text) if trusted else (text,):
                if trusted and piece in self.special_tokens:
                    flush()
                    ids.append(self.special_tokens[piece])
                elif piece:
                    plain.append(piece)
        flush()
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn ids into text; an id in range that has no token (a padded vocabulary) has no text.

        Raises:
            InvalidRequestError: An id is negative or does not fit 32 bits, or the decoder cannot handle the ids.
        """
        for token_id in token_ids:
            if not 0 <= token_id < 2**32:
                raise InvalidRequestError(f"Token id {token_id} is out of range: 0 to {self.vocab_size - 1}.")
        with _contained(InvalidRequestError, "The tokenizer cannot decode these tokens"):
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_string(self, token_id: int) -> str | None:
        """Return the token as the vocabulary spells it, None if the id has none."""
        return self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of one token's text: a part of a character where the token is one."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.token_string(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            alphabet = _byte_alphabet()
            return b"".join(bytes((alphabet[c],)) if c in alphabet else c.encode() for c in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes((int(match[1], 16),))
        return token.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """Return one token's text; U+FFFD stands for bytes that are a part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def min_tokens(self, text: str) -> int:
        """Bound from below, without tokenizing, how many tokens `text` has.

        0 where no bound is known: without byte tokens, one unknown-token can stand for any length of text.
        """
        # Half, because a normalizer may compose: four Greek code points become one of three bytes.
        return len(text) // (2 * self._longest_token_bytes) if self._longest_token_bytes else 0

    @cached_property
    def _literal_tokenizer(self) -> tokenizers.Tokenizer:
        # The switch is per instance and not per call, hence a second instance (the library is used from threads).
        literal = _parse(self.json)
        literal.encode_special_tokens = True
        return literal

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        literals = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, literals))})" if literals else r"(?!)")

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.json).get("decoder"))

    @cached_property
    def _longest_token_bytes(self) -> int:
        model = json.loads(self.json)["model"]
        if not (self._is_byte_level or model.get("byte_fallback")):
            return 0
        return max((len(token.encode()) for token in self._tokenizer.get_vocab()), default=0)


def _parse(tokenizer_json: str) -> tokenizers.Tokenizer:
    import tokenizers

    with _contained(CheckpointError, "tokenizer.json cannot be read"):
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    # A file may carry the truncation and padding of its training run: never cut a prompt in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextmanager
def _contained(error_type: type[InvalidRequestError | CheckpointError], message: str) -> Iterator[None]:
    """Turn what the library raises, its panics included, into `error_type`."""
    try:
        yield
    except BaseException as error:
        # pyo3 makes PanicException at run time; it cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise error_type(f"{message}: {error}.") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise CheckpointError(f"{path} cannot be read: {reason}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Find the template where transformers would: its own file first, then the tokenizer's configuration."""
    if (file := directory / "chat_template.jinja").exists():
        return _read_text(file)
    value = _read_json(directory / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{directory / 'tokenizer_config.json'}: chat_template is not text")
    return value


def _named_special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    merged = {**_read_json(directory / "special_tokens_map.json"), **config}
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKEN_NAMES:
        value = merged.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _byte_alphabet() -> Mapping[str, int]:
    """Map each character of byte-level BPE's alphabet to its byte (GPT-2's `bytes_to_unicode`, inverted)."""
    if not _BYTE_ALPHABET:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        rest = [byte for byte in range(256) if byte not in printable]
        _BYTE_ALPHABET.update({chr(byte): byte for byte in printable})
        _BYTE_ALPHABET.update({chr(256 + i): byte for i, byte in enumerate(rest)})
    return _BYTE_ALPHABET


_BYTE_ALPHABET: dict[str, int] = {}
