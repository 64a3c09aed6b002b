"""Text to token ids and back, from a model directory's tokenizer.json; independent of model, server and torch.

The tokenizers library is loaded on first use. What it does with hostile input is contained here: its panics
(a BaseException that would pass every `except Exception` and tear down a nursery) become InvalidRequestError,
ids it would overflow on are refused, and prompts of which only parts may name control tokens go through a second
instance in which control tokens have random names.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trio_llm.errors import CheckpointError, InvalidRequestError
from trio_llm.gguf.header import GgufHeader, is_gguf, read_gguf
from trio_llm.gguf.tokenizer import named_tokens, tokenizer_json
from trio_llm.model_files import MAX_TEMPLATE_BYTES, MAX_TOKENIZER_BYTES, has_file, read_optional_json, read_text

MAX_TOKENS = 2**22
"""Bound of a tokenizer's ids, a guess: the largest vocabularies have 262,144."""

if TYPE_CHECKING:
    import tokenizers

# A batch of one costs no more than a single decode from here on, which takes under a millisecond.
_LONG_TOKENS = 1024
_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONTROL_SPELLING = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """A tokenizer.json with the model's chat template and special tokens.

    Attributes:
        json: The text of tokenizer.json.
        vocab_size: One past the largest id that has a token.
        added_tokens: Literal -> id of the tokens that stand for a literal wherever it is in a text.
        special_tokens: Literal -> id of the control tokens.
        named_special_tokens: "bos_token", "eos_token", ... -> literal, if the model has them.
        chat_template: Jinja source, None if the model has none.
        tool_template: The template for conversations with tools, None if it is the same.
        response_template: What tokenizer_config.json says about how answers are written; None if it says nothing.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        chat_template: str | None = None,
        tool_template: str | None = None,
        named_special_tokens: Mapping[str, str] | None = None,
        response_template: object = None,
    ) -> None:
        self.json = tokenizer_json
        self._tokenizer = _parse(tokenizer_json)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.added_tokens: Mapping[str, int] = {t.content: i for i, t in added.items()}
        self.special_tokens: Mapping[str, int] = {t.content: i for i, t in added.items() if t.special}
        self.named_special_tokens: Mapping[str, str] = dict(named_special_tokens or {})
        self.chat_template = chat_template
        self.tool_template = tool_template
        self.response_template = response_template
        self._private: tokenizers.Tokenizer | None = None
        self._building = threading.Lock()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = 1 + max(ids, default=-1)
        if self.vocab_size > MAX_TOKENS:  # Masks have a bit for each id, and the index of grammars many bytes.
            raise CheckpointError(f"tokenizer.json: token id {self.vocab_size - 1}: at most {MAX_TOKENS - 1}")

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a model directory, or of a GGUF file.

        Raises:
            CheckpointError: A file is missing or cannot be parsed; the message names it.
        """
        directory = Path(path)
        if is_gguf(directory):
            return cls._from_gguf(read_gguf(directory))
        config = read_optional_json(directory, "tokenizer_config.json")
        return cls(
            read_text(directory, "tokenizer.json", MAX_TOKENIZER_BYTES),
            **_chat_templates(directory, config),
            named_special_tokens=_named_special_tokens(directory, config),
            response_template=config.get("response_template"),
        )

    @classmethod
    def _from_gguf(cls, header: GgufHeader) -> Self:
        template = header.metadata.get("tokenizer.chat_template")
        return cls(
            json.dumps(tokenizer_json(header)),
            chat_template=template if isinstance(template, str) else None,
            named_special_tokens=named_tokens(header),
        )

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end token; None if it has none, or one that does not exist."""
        literal = self.named_special_tokens.get("eos_token")
        return None if literal is None else self._tokenizer.token_to_id(literal)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize `text`; the literal of a control token is read as that token.

        Args:
            text: Any Unicode text.
            add_special_tokens: Add the model's tokens around a prompt (for example a BOS).

        Raises:
            InvalidRequestError: The text is not valid Unicode, or the tokenizer cannot handle it.
        """
        return self._encode(self._tokenizer, text, add_special_tokens=add_special_tokens)

    @staticmethod
    def _encode(tokenizer: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"The text is not valid Unicode: {error.reason}.") from None
        with _contained(InvalidRequestError, "The tokenizer cannot encode this text"):
            # As a batch of one: `encode` would hold the GIL, and block the event loop, for seconds on a long text.
            return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Tokenize a text in which only some parts may contain control tokens.

        The whole text is tokenized in one piece, so that the result is that of `encode` wherever no untrusted segment
        spells a control token, white space round control tokens included.

        Args:
            segments: (text, trusted), in order; neighbours differ in trust, or a token may be cut in two.
        """
        names = self._private_names
        text = "".join(
            self._control_pattern.sub(lambda found: names[found[0]], text) if trusted else text
            for text, trusted in segments
        )
        return self._encode(self._private_tokenizer, text, add_special_tokens=False)

    @property
    def is_prepared(self) -> bool:
        """Whether `encode_segments` needs no preparation."""
        return self._private is not None

    def prepare(self) -> None:
        """Build what `encode_segments` needs: 2 s of CPU time for 262,144 tokens (measured). Idempotent."""
        _ = self._private_tokenizer

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn ids into text; an id in range that has no token (a padded vocabulary) has no text.

        Raises:
            InvalidRequestError: An id is negative or does not fit 32 bits, or the decoder cannot handle the ids.
        """
        # Once per token of every stream: neither a context manager nor a look at each id.
        try:
            if len(token_ids) > _LONG_TOKENS:  # As in `encode`; few take twice as long so.
                return self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            outside = next(token_id for token_id in token_ids if not 0 <= token_id < 2**32)
            message = f"Token id {outside} is out of range: 0 to {self.vocab_size - 1}."
            raise InvalidRequestError(message) from None
        except BaseException as error:  # noqa: BLE001 - panics too
            raise _converted(error, InvalidRequestError, "The tokenizer cannot decode these tokens") from None

    def token_string(self, token_id: int) -> str | None:
        """Return the token as the vocabulary spells it, None if the id has none."""
        return self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of one token's text, which may be a part of a character."""
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
    def control_tokens(self) -> Mapping[str, int]:
        """Literal -> id of the tokens that users cannot write into a chat."""
        return {self._added[i]: i for i in self._added if self._is_control(i)}

    @cached_property
    def _private_names(self) -> Mapping[str, str]:
        """Map each control token to an unguessable name, in letters that no normalizer changes."""
        nonce = secrets.token_hex(16)
        return {token: f"{nonce}{token_id:08x}" for token, token_id in self.control_tokens.items()}

    def _is_control(self, token_id: int) -> bool:
        # Some models (DeepSeek) open turns with tokens that look special but are not declared so.
        spelling = self._added[token_id]
        return spelling in self.special_tokens or _CONTROL_SPELLING.fullmatch(spelling) is not None

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        literals = sorted(self._private_names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, literals)) or r"(?!)")

    @property
    def _private_tokenizer(self) -> tokenizers.Tokenizer:
        with self._building:
            if self._private is None:
                self._private = _parse(json.dumps(_renamed(json.loads(self.json), self._private_names)))
            return self._private

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
    # A file may have the truncation and padding of its training run: never cut a prompt silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def unspellable(tokenizer_json: str) -> str:
    """Return a tokenizer.json whose control tokens no text spells; every id stays.

    For llguidance. It never takes control tokens for text, nor other added tokens of the form <...>, but it tokenizes
    the text that a grammar forces, and would find them there: no token could follow.
    """
    data = json.loads(tokenizer_json)
    kept_out = [t for t in data.get("added_tokens") or [] if t["special"] or re.fullmatch(r"(?s)<.*>", t["content"])]
    for token in kept_out:
        token["special"] = True
    nonce = secrets.token_hex(16)
    names = {token["content"]: f"{nonce}{token['id']:08x}" for token in kept_out}
    return json.dumps(_renamed(data, names))


def _renamed(data: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the object of a tokenizer.json with other spellings of some added tokens; every id stays."""
    for token in data.get("added_tokens") or []:
        if token["content"] in names:
            # Where a control token stands is already decided when this tokenizer sees the name.
            token.update(content=names[token["content"]], normalized=False, single_word=False)
    model = data["model"]
    if isinstance(vocab := model["vocab"], dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in vocab.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not _makes_any(pair, names)]
    return data


def _makes_any(pair: str | list[str], names: Mapping[str, str]) -> bool:
    """Return whether a merge makes one of these tokens or a part of one."""
    parts = pair.split(" ") if isinstance(pair, str) else pair
    return "".join(parts) in names or any(part in names for part in parts)


@contextmanager
def _contained(error_type: type[InvalidRequestError | CheckpointError], message: str) -> Iterator[None]:
    """Turn what the library raises, its panics included, into `error_type`."""
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - panics too
        raise _converted(error, error_type, message) from None


def _converted(
    error: BaseException, error_type: type[InvalidRequestError | CheckpointError], message: str
) -> BaseException:
    """Return the error of `error_type` for what the library raised; what does not come from it stays as it is."""
    # pyo3 makes PanicException at run time; it cannot be imported.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    return error_type(f"{message}: {error}.")


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str | None]:
    """Find the templates where transformers would: in files of their own first, then in the configuration."""
    if has_file(directory, "chat_template.jinja"):
        special = "additional_chat_templates/tool_use.jinja"
        tools = read_text(directory, special, MAX_TEMPLATE_BYTES) if has_file(directory, special) else None
        return {
            "chat_template": read_text(directory, "chat_template.jinja", MAX_TEMPLATE_BYTES),
            "tool_template": tools,
        }
    value = read_optional_json(directory, "chat_template.json").get("chat_template", config.get("chat_template"))
    named: dict[Any, Any] = {"default": value}
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    templates = {"chat_template": named.get("default"), "tool_template": named.get("tool_use")}
    for template in templates.values():
        if template is not None and not isinstance(template, str):
            raise CheckpointError(f"{directory / 'tokenizer_config.json'}: chat_template is not text")
        if len(template or "") > MAX_TEMPLATE_BYTES:
            raise CheckpointError(
                f"{directory / 'tokenizer_config.json'}: a chat_template of {len(template or '')} characters, "
                f"more than the {MAX_TEMPLATE_BYTES} allowed"
            )
    return templates


def _named_special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    merged = {**read_optional_json(directory, "special_tokens_map.json"), **config}
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
