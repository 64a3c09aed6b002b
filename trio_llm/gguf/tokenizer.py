"""The tokenizer in a GGUF file, written as the tokenizer.json that Hugging Face would have published.

Knows three kinds: byte-level BPE, whose text is cut by a regular expression that the file names ("pre"); SentencePiece
BPE with byte fallback, whose merges follow from the scores; and Gemma 4's, which is the second with merges in the file.
Any other kind is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.gguf.header import GgufHeader

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SINGLE_DIGITS = _WORDS + r"\p{N}" + _REST
# How a text is cut before merging, by the file's "pre"; None is GPT-2's own cut.
_CUTS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _WORDS + r"\p{N}{1,3}" + _REST),
    "qwen2": _SINGLE_DIGITS,
    "deepseek-r1-qwen": _SINGLE_DIGITS,
    "tekken": _CASED,
}
_NORMALIZED_NFC = {"qwen2", "deepseek-r1-qwen"}
# A word that is a token needs no merges, and a text begins with BOS where the file does not say.
_WHOLE_WORDS_FIRST = _BEGINS_WITH_BOS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"}


def tokenizer_json(header: GgufHeader) -> dict[str, Any]:
    """Return the contents of a tokenizer.json with the same ids.

    Raises:
        UnsupportedError: A kind of tokenizer that is not here, by name.
        CheckpointError: The metadata is damaged.
    """
    tokens = _list(header, "tokenizer.ggml.tokens", str)
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.tokens has a token twice")
    kinds = _list(header, "tokenizer.ggml.token_type", int, len(tokens)) or [1] * len(tokens)
    kind = header.get("tokenizer.ggml.model", str)
    if kind == "gpt2":
        pre = header.get("tokenizer.ggml.pre", str, "default")
        whole, bos_first = _byte_level(header, tokens, pre), pre in _BEGINS_WITH_BOS
    elif kind == "llama":
        scores = _list(header, "tokenizer.ggml.scores", float, len(tokens))
        if not scores:
            raise CheckpointError(f"{header.path}: tokenizer.ggml.scores is missing")
        whole, bos_first = _sentencepiece(header, tokens, _merges(tokens, scores)), True
    elif kind == "gemma4":
        whole, bos_first = _sentencepiece(header, tokens, _pairs(header)), True
    else:
        known = "gpt2, llama and gemma4 are"
        raise UnsupportedError(f"{header.path}: tokenizer.ggml.model = {kind!r} is not supported; {known}")
    whole["added_tokens"] = [
        _added(token_id, token, special=kinds[token_id] != _USER_DEFINED)
        for token_id, token in enumerate(tokens)
        if kinds[token_id] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    whole["post_processor"] = _around(header, tokens, bos_first)
    return {"version": "1.0", "truncation": None, "padding": None, **whole}


def named_tokens(header: GgufHeader) -> dict[str, str]:
    """Return "bos_token", "eos_token", ... -> its text, for those that the file names."""
    tokens = _list(header, "tokenizer.ggml.tokens", str)
    found: dict[str, str] = {}
    for name, key in _NAMES.items():
        token_id = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            found[name] = tokens[token_id]
    return found


def _byte_level(header: GgufHeader, tokens: Sequence[str], pre: str) -> dict[str, Any]:
    if pre not in _CUTS:
        raise UnsupportedError(f"{header.path}: tokenizer.ggml.pre = {pre!r} is not supported; {', '.join(_CUTS)} are")
    cut = _CUTS[pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cut is None}
    first = _split(cut) if cut else {"type": "Digits", "individual_digits": True}
    return {
        "normalizer": {"type": "NFC"} if pre in _NORMALIZED_NFC else None,
        "pre_tokenizer": byte_level if pre == "gpt-2" else {"type": "Sequence", "pretokenizers": [first, byte_level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, _pairs(header), ignore_merges=pre in _WHOLE_WORDS_FIRST),
    }


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _pairs(header: GgufHeader) -> list[list[str]]:
    """Return the file's own merges."""
    merges = [merge.split(" ") for merge in _list(header, "tokenizer.ggml.merges", str)]
    if any(len(pair) != 2 for pair in merges):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.merges has an entry that is no pair")
    return merges


def _sentencepiece(header: GgufHeader, tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decode: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizer: dict[str, Any] = replace
    if header.get("tokenizer.ggml.add_space_prefix", bool, True):
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, replace]}
        decode.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = header.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = _bpe(tokens, merges, byte_fallback=True, fuse_unk=True)
    model["unk_token"] = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    return {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decode},
        "model": model,
    }


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[list[str]]:
    """Return every way to make a token of two others, the token with the best score first."""
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    found: list[tuple[float, int, int]] = []
    for token, token_id in ids.items():
        for at in range(1, len(token)):
            left, right = ids.get(token[:at]), ids.get(token[at:])
            if left is not None and right is not None:
                found.append((-scores[token_id], left, right))
    found.sort()
    return [[tokens[left], tokens[right]] for _, left, right in found]


def _bpe(
    tokens: Sequence[str],
    merges: Sequence[Sequence[str]],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    fuse_unk: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {token: token_id for token_id, token in enumerate(tokens)},
        "merges": list(merges),
    }


def _added(token_id: int, token: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token_id, "content": token, **flags}


def _around(header: GgufHeader, tokens: Sequence[str], bos_first: bool) -> dict[str, Any] | None:
    """Return what puts BOS before and EOS behind a text, as the file asks."""
    before = _named(header, tokens, "bos") if header.get("tokenizer.ggml.add_bos_token", bool, bos_first) else None
    after = _named(header, tokens, "eos") if header.get("tokenizer.ggml.add_eos_token", bool, False) else None
    if before is None and after is None:
        return None
    single: list[Mapping[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    if before is not None:
        single.insert(0, {"SpecialToken": {"id": before[1], "type_id": 0}})
    if after is not None:
        single.append({"SpecialToken": {"id": after[1], "type_id": 0}})
    used = [pair for pair in (before, after) if pair is not None]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]} for token_id, token in used},
    }


def _named(header: GgufHeader, tokens: Sequence[str], name: str) -> tuple[int, str] | None:
    token_id = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        return None
    return token_id, tokens[token_id]


def _list(header: GgufHeader, key: str, kind: type, length: int | None = None) -> list[Any]:
    """Return an array of one kind; empty where it is absent and of a known length, which then is not required."""
    values = header.get(key, list, None if length is None else [])
    if not all(isinstance(value, kind) for value in values):
        raise CheckpointError(f"{header.path}: {key} is of another type than expected")
    if length is not None and len(values) not in (0, length):
        raise CheckpointError(f"{header.path}: {key} has {len(values)} entries, not {length}")
    return values
