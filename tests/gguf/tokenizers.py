"""A tokenizer.json written as the metadata of a GGUF file, as llama.cpp's converter would."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf

from trio_llm.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def write(files: Path, path: Path, model: str, pre: str | None = None) -> Path:
    """Write a file of metadata only.

    Args:
        files: Directory with tokenizer.json and tokenizer_config.json.
        model: tokenizer.ggml.model: gpt2 and gemma4 store merges, llama stores scores.
        pre: tokenizer.ggml.pre, of gpt2.
    """
    data = json.loads((files / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    tokens, kinds = _tokens(data)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in data["model"]["merges"]]
    if model == "llama":
        # The score of a piece is its rank: the merges of tokenizer.json were made from it.
        ranks = {text: rank for rank, text in enumerate(dict.fromkeys(first + second for first, second in merges))}
        writer.add_token_scores([-float(ranks.get(token, 0)) for token in tokens])
    else:
        writer.add_token_merges([f"{first} {second}" for first, second in merges])
    if model != "gpt2":
        writer.add_add_space_prefix("Prepend" in str(data["normalizer"]))
    original = Tokenizer.from_directory(files)
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("unk", "unk_token"), ("pad", "pad_token")):
        if (token := original.named_special_tokens.get(key)) is not None:
            getattr(writer, f"add_{name}_token_id")(tokens.index(token))
    writer.add_add_bos_token("bos_token" in original.named_special_tokens and len(original.encode("")) == 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tokens(data: dict[str, Any]) -> tuple[list[str], list[gguf.TokenType]]:
    """Return texts and types of all ids; an id that is not used gets a text of its own."""
    added = {token["id"]: token for token in data["added_tokens"]}
    texts = {token_id: text for text, token_id in data["model"]["vocab"].items()}
    texts.update({token_id: token["content"] for token_id, token in added.items()})
    kinds: list[gguf.TokenType] = []
    for token_id in range(max(texts) + 1):
        text = texts.setdefault(token_id, f"[PAD{token_id}]")
        if token_id in added:
            looks_special = added[token_id]["special"] or (text.startswith("<|") and text.endswith("|>"))
            unknown = text == data["model"]["unk_token"]
            special = gguf.TokenType.UNKNOWN if unknown else gguf.TokenType.CONTROL
            kinds.append(special if looks_special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.BYTE if _BYTE.fullmatch(text) else gguf.TokenType.NORMAL)
    return [texts[token_id] for token_id in range(len(kinds))], kinds
