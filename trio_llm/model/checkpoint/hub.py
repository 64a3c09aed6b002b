"""From the `model` setting to a directory or GGUF file: a path, a hub id, or the default.

This module does not import torch, so that the tokenizer loads first.
"""

from __future__ import annotations

import re
from pathlib import Path

from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError, ConfigError
from trio_llm.gguf.header import is_gguf
from trio_llm.model.checkpoint.download import HubId, fetch

DEFAULT_DIRECTORY = Path("/models/Qwen2.5-0.5B-Instruct")
_LATER_SHARD = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_CHECKPOINT = "config.json, tokenizer.json and *.safetensors"


def resolve_model(model: str | None, revision: str | None = None) -> Path:
    """Return the checkpoint's directory or GGUF file, downloading it if `model` is a hub id.

    Args:
        model: None for DEFAULT_DIRECTORY if it exists, else the demo model.
        revision: Branch, tag or commit of a hub id.
    Raises:
        CheckpointError: There is no such directory or file and it cannot be downloaded, or it holds no checkpoint.
        ConfigError: A revision of what is no hub id.
    """
    found = _local_model(model)
    if found is None:
        assert model is not None
        hub_id = HubId.parse(model, revision)
        if hub_id is None:
            raise CheckpointError(f"{model!r}: no such directory or GGUF file, nor a hub id (owner/name)")
        path = fetch(hub_id)
        return _checkpoint_in(path) if path.is_dir() else path
    if revision is not None:
        raise ConfigError("revision", revision, "model", f"is for a hub id; the model is {found}")
    return found


def resolve_tokenizer(engine: EngineConfig) -> Path:
    """Return where the tokenizer is. Raises as `resolve_model`."""
    if engine.tokenizer is not None:
        return resolve_model(engine.tokenizer)
    return resolve_model(engine.model, engine.revision)


def model_name(model: str | None, path: Path) -> str:
    """Return what a model is called unless the settings say so: a hub id as it was given, else the path's last part."""
    return path.name if model is None or _exists(Path(model).expanduser()) else model


def _local_model(model: str | None) -> Path | None:
    """Return a path of this machine; None for what must be a hub id."""
    if model is None:
        if DEFAULT_DIRECTORY.is_dir():
            return DEFAULT_DIRECTORY
        from trio_llm.demo import demo_model_path

        return demo_model_path()
    path = Path(model).expanduser()
    found = model != "" and _exists(path)
    if found and path.is_dir():
        return _checkpoint_in(path)
    if found and is_gguf(path):
        return path
    if found:
        raise CheckpointError(f"{model!r}: neither a directory nor a .gguf file; a model directory holds {_CHECKPOINT}")
    hub_id = HubId.parse(model)
    if is_gguf(path) and (hub_id is None or hub_id.tag is None):
        raise CheckpointError(f"{model}: no such file")
    if hub_id is not None and Path(model).parent.is_dir():
        # The parent directory exists, so this is a path: do not ask the hub.
        names = ", ".join(sorted(entry.name for entry in Path(model).parent.iterdir() if entry.is_dir())[:8])
        raise CheckpointError(f"{model}: not a directory; {Path(model).parent}/ holds {names or 'no directories'}")
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL: no file has such a name
        return False


def _checkpoint_in(directory: Path) -> Path:
    """Return the directory if it holds a model or a tokenizer, or its only GGUF file; else say what it holds."""
    if any((directory / name).exists() for name in ("config.json", "tokenizer.json")):
        return directory
    files = [path for path in sorted(directory.glob("*.gguf")) if not _LATER_SHARD.search(path.name)]
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:20])
        raise CheckpointError(f"{directory}: {len(files)} GGUF files; name one of them: {names}")
    if files:
        return files[0]
    expected = f"expected {_CHECKPOINT}"
    # The second pattern is the layout of the hub's cache.
    for inner in (*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json")):
        expected = f"did you mean {inner.parent}?"
    raise CheckpointError(f"{directory}: not a checkpoint, it has no config.json; {expected}")


def resolve_draft(spec_model: str | None, model: Path) -> Path:
    """Return the draft model's checkpoint. Only the demo model has a default.

    Args:
        model: The checkpoint of the model to draft for.
    Raises:
        ConfigError: None was named, and the model is not the demo model.
        CheckpointError: As `resolve_model`.
    """
    if spec_model is not None:
        return resolve_model(spec_model)
    from trio_llm.demo import demo_model_path, draft_model_path

    if model != demo_model_path():
        allowed = f"must name a smaller model with the tokenizer of {model.name} (--spec-model)"
        raise ConfigError("spec_model", None, "spec_method = draft_model", allowed)
    return draft_model_path()
