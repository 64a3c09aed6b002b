"""config.json as typed accessors that name the key they miss.

Knows how Hugging Face spells things, in old and new versions; nothing of any one model family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import attrs
import torch

from trio_llm.errors import CheckpointError, UnsupportedError

MAX_JSON_BYTES = 64 * 1024 * 1024  # a config is kilobytes, a weight index a few megabytes; guessed generously
MAX_INT = 2**31 - 1
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Choice = TypeVar("Choice")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file of sane size.

    Raises:
        CheckpointError: Names the file and what is wrong with it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes, more than the {MAX_JSON_BYTES} allowed")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(value).__name__}")
    return cast("dict[str, Any]", value)


@attrs.frozen
class ModelConfig:
    """One level of a config.json. Absent and null mean the same, as they do to Hugging Face.

    Attributes:
        values: The parsed object.
        source: What errors call it.
    """

    values: Mapping[str, Any]
    source: str

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read config.json; `auto_map` and anything else that would run code is never looked at."""
        path = directory / "config.json"
        return cls(read_json(path), str(path))

    @property
    def text(self) -> ModelConfig:
        """The language model's part: `text_config` of a multimodal wrapper, else all of it."""
        return self.section("text_config") if self.has("text_config") else self

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def section(self, key: str) -> ModelConfig:
        value = self._get(key, None, (dict,), "an object")
        return ModelConfig(value, f"{self.source}: {key}")

    def get_int(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_INT) -> int:
        value = self._get(key, default, (int,), "an integer")
        if not least <= value <= most:
            raise CheckpointError(f"{self.source}: {key} = {value}: must be from {least} to {most}")
        return value

    def get_float(self, key: str, default: float | None = None) -> float:
        value = float(self._get(key, default, (int, float), "a number"))
        if not -1e30 < value < 1e30:  # json.loads accepts NaN and Infinity
            raise CheckpointError(f"{self.source}: {key} = {value}: must be finite")
        return value

    def get_bool(self, key: str, default: bool | None = None) -> bool:
        return self._get(key, default, (bool,), "true or false")

    def get_str(self, key: str, default: str | None = None) -> str:
        return self._get(key, default, (str,), "a string")

    def strings(self, key: str, length: int) -> tuple[str, ...]:
        """Return a list of exactly `length` strings."""
        value = self._get(key, None, (list,), "a list")
        if len(value) != length or not all(isinstance(item, str) for item in value):
            raise CheckpointError(f"{self.source}: {key}: expected {length} strings, found {len(value)} entries")
        return tuple(value)

    def choice(self, key: str, allowed: Mapping[str, Choice], default: str | None = None) -> Choice:
        """Return what `allowed` maps the value to; anything else is refused by name."""
        value = self.get_str(key, default)
        if value not in allowed:
            raise UnsupportedError(f"{self.source}: {key} = {value!r} is not supported; {', '.join(allowed)} are")
        return allowed[value]

    def dtype(self) -> torch.dtype:
        """The checkpoint's own type: `dtype` since transformers 5, `torch_dtype` before; bfloat16 if neither."""
        for config in (self.text, self):
            for key in ("dtype", "torch_dtype"):
                if config.has(key):
                    name = config.get_str(key).removeprefix("torch.")
                    if name not in TORCH_DTYPES:
                        supported = ", ".join(TORCH_DTYPES)
                        raise UnsupportedError(f"{config.source}: {key} = {name!r}; {supported} are supported")
                    return TORCH_DTYPES[name]
        return torch.bfloat16

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return one id or a list of ids as a tuple; empty where there is none."""
        if not self.has(key):
            return ()
        value = self._get(key, None, (int, list), "a token id or a list of them")
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not all(type(item) is int and item >= 0 for item in ids):
            raise CheckpointError(f"{self.source}: {key} = {value!r}: expected token ids")
        return ids

    def _get(self, key: str, default: Any, types: tuple[type, ...], expected: str) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.source}: {key} is missing")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise CheckpointError(f"{self.source}: {key} = {value!r}: expected {expected}")
        return value
