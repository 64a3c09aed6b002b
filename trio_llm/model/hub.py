"""From the `model` setting to a directory: a path, a hub id, or what is served when nothing is named.

Needs no torch, so that the tokenizer can be found before the model is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from trio_llm.errors import CheckpointError, ConfigError

DEFAULT_DIRECTORY = Path("/models/Qwen2.5-0.5B-Instruct")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def resolve_model(model: str | None) -> Path:
    """Return the checkpoint's directory, downloading it where `model` is a hub id.

    Args:
        model: None for DEFAULT_DIRECTORY where it exists, else the demo model.
    Raises:
        CheckpointError: There is no such directory and no way to fetch one.
    """
    if model is None:
        if DEFAULT_DIRECTORY.is_dir():
            return DEFAULT_DIRECTORY
        from trio_llm.demo import demo_model_path

        return demo_model_path()
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model!r}: not a directory, nor a hub id (owner/name)")
    return _download(model)


def resolve_draft(spec_model: str | None, model: Path) -> Path:
    """Return the draft model's checkpoint; by default the demo model has one.

    Args:
        model: The checkpoint of the model that it drafts for.
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


def _download(hub_id: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{hub_id}: no such directory; to fetch it from a hub, `pip install huggingface_hub`"
        ) from None
    try:
        # passed on because huggingface_hub reads the variable only once, when it is first imported
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=HUB_PATTERNS, endpoint=os.environ.get("HF_ENDPOINT")
            )
        )
    except Exception as error:
        raise CheckpointError(f"{hub_id}: not a directory here, and the hub says: {error}") from error
