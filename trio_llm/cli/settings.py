"""Where settings come from: defaults < config.yaml < environment < flags, and an error for what does not parse.

What a key is, means and may be stands in `trio_llm.config`; this file only gathers values and remembers their source.
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
DEFAULT_FILE = Path("config.yaml")


@attrs.frozen
class Given:
    """A value as somebody wrote it, and where."""

    value: Any
    source: str


@attrs.frozen
class Settings:
    """The configuration, and for each key ("server.port") where its value came from."""

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
        path: The YAML file that was asked for; None takes ./config.yaml where it exists.
        environ: The process's variables; an empty one counts as unset.
        flags: What stood on the command line, by dotted key.
    Raises:
        ConfigError: A key is unknown or a value is not allowed; names key, value, source and what is allowed.
    """
    given = {**_from_file(path), **_from_environment(environ), **flags}
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


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Name the VLLM_* variables that no setting reads, each with the known one it resembles, if any.

    They are worth a warning, not an error: a machine may carry variables that are meant for vLLM.
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
    known = [key for key, _ in fields()]
    given: dict[str, Given] = {}
    for section, entries in _read_yaml(Path(source)).items():
        if section not in SECTIONS:
            raise ConfigError(str(section), entries, source, f"unknown section; there are {', '.join(SECTIONS)}")
        if not isinstance(entries, dict | None):
            raise ConfigError(section, entries, source, "must be a mapping of settings")
        for name, value in (entries or {}).items():
            key = f"{section}.{name}"
            if key not in known:
                raise ConfigError(key, value, source, f"unknown setting{_resembling(key, known)}")
            given[key] = Given(value, source)
    return given


def _resembling(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {close[0]}?" if close else "; `trio-llm serve --print-config` lists them all"


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without the one thing it forgives that hides mistakes: a key that stands twice, the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        # A subclass of SafeLoader: no tag can make it construct anything but plain values.
        document = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)  # noqa: S506
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("file", str(path), "--config", f"cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = path.read_text(encoding="utf-8").splitlines()[mark.line].strip() if mark else ""
        where = f"line {mark.line + 1}" if mark else "file"
        raise ConfigError(where, line, str(path), f"is not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError("file", str(path), str(path), f"is not YAML: {error}") from None
    if not isinstance(document, dict | None):
        raise ConfigError("file", document, str(path), f"must hold the sections {', '.join(SECTIONS)}")
    return document or {}


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
    """Take apart a list written as JSON, as vLLM's flags want it: `--allowed-origins '["https://chat.example"]'`."""
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
    shown = "***" if attribute.metadata["secret"] else given.value
    if optional and (given.value is None or given.value == "none"):
        return None
    try:
        value = _converter.structure(given.value, kind)
    except (TypeError, ValueError):
        raise ConfigError(key, shown, given.source, f"must be {describe(attribute.type)}") from None
    if reason := out_of_range(attribute, value):
        raise ConfigError(key, shown, given.source, reason)
    return value


def _unwrap(kind: Any) -> tuple[Any, bool]:
    """Split `X | None` into X and True; anything else is itself and False."""
    if not isinstance(kind, types.UnionType) and typing.get_origin(kind) is not typing.Union:
        return kind, False
    return next(part for part in typing.get_args(kind) if part is not type(None)), True


def describe(kind: Any) -> str:
    """Say in words what a setting of this type may be."""
    inner, optional = _unwrap(kind)
    words = "one of " + ", ".join(typing.get_args(inner)) if typing.get_origin(inner) is Literal else _KINDS[inner][0]
    return words + (", or none" if optional else "")


def metavar(kind: Any) -> str:
    """Say in `--help` what a setting of this type may be."""
    inner, _ = _unwrap(kind)
    return "|".join(typing.get_args(inner)) if typing.get_origin(inner) is Literal else _KINDS[inner][1]


_KINDS: Mapping[Any, tuple[str, str]] = {
    int: ("a whole number", "INTEGER"),
    float: ("a number", "NUMBER"),
    bool: ("true or false", "BOOLEAN"),
    str: ("text", "TEXT"),
    tuple[str, ...]: ("a text or a list of texts", "TEXT"),
}
