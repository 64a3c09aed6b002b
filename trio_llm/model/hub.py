"""From the `model` setting to a directory: a path, a hub id, or what is served when nothing is named.

Needs no torch, so that the tokenizer can be found before the model is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from trio_llm.errors import CheckpointError

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
