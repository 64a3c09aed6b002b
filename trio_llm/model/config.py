"""Typed accessors for config.json; errors name the key.

It knows Hugging Face's spellings, old and new, but no single model family.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch

from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.model_files import read_json

MAX_INT = 2**31 - 1
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Choice = TypeVar("Choice")


@attrs.frozen
class ModelConfig:
    """One level of a config.json. Absent and null mean the same, as in Hugging Face.

    Attributes:
        values: The parsed object.
        source: Its name in errors.
    """

    values: Mapping[str, Any]
    source: str

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read config.json; `auto_map` and other keys that would run code are ignored."""
        return cls(read_json(directory, "config.json"), str(directory / "config.json"))

    @property
    def text(self) -> ModelConfig:
        """The language model's part: `text_config` of a multimodal wrapper, else all of it."""
        return self.section("text_config") if self.has("text_config") else self

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def section(self, key: str) -> ModelConfig:
        value = self._get(key, None, (dict,), "an object")
        return ModelConfig(value, f"{self.source}: {key}")

    def get_int(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INT) -> int:
        value = self._get(key, default, (int,), "an integer")
        if not minimum <= value <= maximum:
            raise CheckpointError(f"{self.source}: {key} = {value}: must be from {minimum} to {maximum}")
        return value

    def get_float(self, key: str, default: float | None = None, *, above: float = 0) -> float:
        value = float(self._get(key, default, (int, float), "a number"))
        if not -1e30 < value < 1e30:  # json.loads accepts NaN and Infinity
            raise CheckpointError(f"{self.source}: {key} = {value}: must be finite")
        if value <= above:
            raise CheckpointError(f"{self.source}: {key} = {value}: must be above {above:g}")
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

    def floats(self, key: str, length: int) -> tuple[float, ...]:
        """Return a list of exactly `length` numbers other than 0; 1e30 is how GGUF stops a rotation, in float32."""
        value = self._get(key, None, (list,), "a list")
        if len(value) != length or not all(isinstance(item, float) and 0 < abs(item) < 1e31 for item in value):
            raise CheckpointError(f"{self.source}: {key}: expected {length} numbers, found {len(value)} entries")
        return tuple(value)

    def choice(self, key: str, allowed: Mapping[str, Choice], default: str | None = None) -> Choice:
        """Return `allowed[value]`.

        Raises:
            UnsupportedError: `allowed` lacks the value; names it.
        """
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
        """Return one id or a list of ids as a tuple; empty if the key is absent."""
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
