"""Load settings: defaults < config.yaml < environment < flags, with an error for each invalid value.

`trio_llm.config` declares the keys; this module gathers values and records their sources.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import cattrs
import yaml

from trio_llm.config import AuthConfig, Config, EngineConfig, LimitsConfig, ServerConfig
from trio_llm.errors import ConfigError
from trio_llm.setting import out_of_range

SECTIONS: Mapping[str, type] = {
    "server": ServerConfig,
    "engine": EngineConfig,
    "auth": AuthConfig,
    "limits": LimitsConfig,
}
# Both say what keys and values are stored as.
_KV_TYPES = ("engine.kv_quantization", "engine.kv_cache_dtype")
DEFAULT_FILE = Path("config.yaml")
_MAX_FILE_BYTES = 2**20


@attrs.frozen
class Given:
    """A raw value and its source."""

    value: Any
    source: str


@attrs.frozen
class Settings:
    """The configuration, and the source of each key's value ("server.port")."""

    config: Config
    sources: Mapping[str, str]


def fields() -> Iterator[tuple[str, attrs.Attribute[Any]]]:
    """Yield every setting as its dotted key and its declaration, types resolved."""
    for section, cls in SECTIONS.items():
        attrs.resolve_types(cls)
        for attribute in attrs.fields(cls):
            yield f"{section}.{attribute.name}", attribute


def load_settings(path: Path | None, environ: Mapping[str, str], flags: Mapping[str, Given]) -> Settings:
    """Gather every setting.

    Args:
        path: The YAML file; None for ./config.yaml if it exists.
        environ: The process's variables; an empty one counts as unset.
        flags: From the command line, by dotted key.
    Raises:
        ConfigError: A key is unknown or a value is not allowed; names key, value, source and what is allowed.
    """
    given = _merged(_from_file(path), _from_environment(environ), flags)
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    sources: dict[str, str] = {}
    for key, attribute in fields():
        section, name = key.split(".")
        entry = given.get(key)
        sources[key] = entry.source if entry else "default"
        if entry is not None:
            values[section][name] = _parse(key, attribute, entry)
    sections: dict[str, Any] = {section: cls(**values[section]) for section, cls in SECTIONS.items()}
    return Settings(Config(**sections), sources)


def _merged(*layers: Mapping[str, Given]) -> dict[str, Given]:
    """Return what the last layer that gives a setting says.

    A layer that gives one of the two settings of keys and values decides both: a flag for one wins over a file's word
    on the other.
    """
    given: dict[str, Given] = {}
    for layer in layers:
        if any(key in layer for key in _KV_TYPES):
            given = {key: entry for key, entry in given.items() if key not in _KV_TYPES}
        given.update(layer)
    return given


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Name the VLLM_* variables that no setting reads, each with the known one it resembles, if any.

    They get a warning, not an error: the machine may have variables for vLLM.
    """
    known = [attribute.metadata["env"] for _, attribute in fields() if attribute.metadata["env"]]
    unknown = sorted(name for name in environ if name.startswith("VLLM_") and name not in known)
    return {name: next(iter(difflib.get_close_matches(name, known, 1, 0.75)), None) for name in unknown}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    return {
        key: Given(text, f"environment {variable}")
        for key, attribute in fields()
        if (variable := attribute.metadata["env"]) and (text := environ.get(variable))
    }


def _from_file(path: Path | None) -> dict[str, Given]:
    if path is None and not DEFAULT_FILE.is_file():
        return {}
    source = str(path or DEFAULT_FILE)
    return given_in(_read_yaml(Path(source)), source)


def given_in(document: Mapping[Any, Any], source: str) -> dict[str, Given]:
    """Return the raw values of a mapping of sections, such as config.yaml.

    Raises:
        ConfigError: A section or a setting is unknown.
    """
    known = [key for key, _ in fields()]
    given: dict[str, Given] = {}
    for section, entries in document.items():
        if section not in SECTIONS:
            names = list(entries) if isinstance(entries, dict) else entries
            allowed = f"unknown section; there are {', '.join(SECTIONS)}"
            raise ConfigError(str(section), _redacted(str(section), names), source, allowed)
        if not isinstance(entries, dict | None):
            raise ConfigError(section, _redacted(section, entries), source, "must be a mapping of settings")
        for name, value in (entries or {}).items():
            key = f"{section}.{name}"
            if key not in known:
                raise ConfigError(key, _redacted(key, value), source, f"unknown setting{_resembling(key, known)}")
            given[key] = Given(value, source)
    return given


def _redacted(where: str, value: Any) -> Any:
    """Return a value for an error, unless it may be a key whose setting is misspelled: errors end in logs."""
    return "***" if "auth" in where or "key" in where else value


def _resembling(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {close[0]}?" if close else "; `trio-llm serve --print-config` lists them all"


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses duplicate keys, which would hide mistakes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key!r} occurs twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[Any, Any]:
    text = _read_text(path)
    try:
        # A subclass of SafeLoader: no tag can make it construct anything but plain values.
        document = yaml.load(text, _UniqueKeyLoader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        number = error.problem_mark.line if error.problem_mark else 0
        lines = text.splitlines()
        # An error at the end of the file is marked after its last line.
        where, line = (f"line {number + 1}", lines[number].strip()) if number < len(lines) else ("end of file", "")
        raise ConfigError(where, _redacted(line, line), str(path), f"is not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError("file", str(path), str(path), f"is not YAML: {error}") from None
    except RecursionError:
        raise ConfigError("file", str(path), str(path), "is nested too deeply") from None
    if not isinstance(document, dict | None):
        raise ConfigError("file", document, str(path), f"must hold the sections {', '.join(SECTIONS)}")
    return document or {}


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("file", str(path), "--config", f"cannot be read: {error}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError("file", str(path), "--config", f"is larger than {_MAX_FILE_BYTES} bytes")
    return text


# --- one parser for all sources: YAML brings typed values, variables and flags bring text ------------------------

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def _to_bool(value: Any, _: type) -> bool:
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    if not isinstance(value, bool):
        raise TypeError
    return value


def _to_int(value: Any, _: type) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return int(value)


def _to_float(value: Any, _: type) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    return float(value)


def _to_str(value: Any, _: type) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _to_strings(value: Any, _: type) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if isinstance(texts, list | tuple):
        texts = [item for text in texts for item in _as_list(text)]
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError
    return tuple(texts)


def _as_list(text: Any) -> list[Any]:
    """Parse a JSON list, as in vLLM's flags: `--allowed-origins '["https://chat.example"]'`."""
    return json.loads(text) if isinstance(text, str) and text.startswith("[") else [text]


def _to_choice(value: Any, kind: Any) -> Any:
    if value not in typing.get_args(kind):
        raise ValueError
    return value


_converter = cattrs.Converter(detailed_validation=False)
_converter.register_structure_hook_func(lambda kind: typing.get_origin(kind) is Literal, _to_choice)
_converter.register_structure_hook(bool, _to_bool)
_converter.register_structure_hook(int, _to_int)
_converter.register_structure_hook(float, _to_float)
_converter.register_structure_hook(str, _to_str)
_converter.register_structure_hook_func(lambda kind: kind == tuple[str, ...], _to_strings)


def _parse(key: str, attribute: attrs.Attribute[Any], given: Given) -> Any:
    kind, optional = _unwrap(attribute.type)
    quoted = "***" if attribute.metadata["secret"] else given.value
    if optional and (given.value is None or given.value == "none"):
        return None
    try:
        value = _converter.structure(given.value, kind)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(key, quoted, given.source, f"must be {describe(attribute.type)}") from None
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and (reason := _bad_text(text)):
            raise ConfigError(key, quoted, given.source, reason)
    if reason := out_of_range(attribute, value):
        raise ConfigError(key, quoted, given.source, reason)
    return value


def _bad_text(text: str) -> str | None:
    """Return the error of a name, path or address: an empty one is usually an unset variable of a script."""
    if not text.strip():
        return "must not be empty; leave it out to have the default"
    if "\0" in text or not text.isprintable():
        return "must not hold control characters"
    return None


def _unwrap(kind: Any) -> tuple[Any, bool]:
    """Split `X | None` into X and True; anything else is itself and False."""
    if not isinstance(kind, types.UnionType) and typing.get_origin(kind) is not typing.Union:
        return kind, False
    return next(part for part in typing.get_args(kind) if part is not type(None)), True


def describe(kind: Any) -> str:
    """Describe the values of a setting of this type."""
    inner, optional = _unwrap(kind)
    words = "one of " + ", ".join(typing.get_args(inner)) if typing.get_origin(inner) is Literal else _KINDS[inner][0]
    return words + (", or none" if optional else "")


def metavar(kind: Any) -> str:
    """Return the metavar of this type for `--help`."""
    inner, _ = _unwrap(kind)
    return "|".join(typing.get_args(inner)) if typing.get_origin(inner) is Literal else _KINDS[inner][1]


_KINDS: Mapping[Any, tuple[str, str]] = {
    int: ("a whole number", "INTEGER"),
    float: ("a number", "NUMBER"),
    bool: ("true or false", "BOOLEAN"),
    str: ("text", "TEXT"),
    tuple[str, ...]: ("a text or a list of texts", "TEXT"),
}
