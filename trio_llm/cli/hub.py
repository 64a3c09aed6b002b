"""`trio-llm pull` and `trio-llm models`: from the Hugging Face hub to its cache, and what the cache holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import click

from trio_llm.cli.show import columns
from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError, TrioLLMError
from trio_llm.model.checkpoint.download import HubId, fetch
from trio_llm.model_files import has_file


@attrs.frozen
class CachedModel:
    """A directory or GGUF file in the cache.

    Attributes:
        architecture: As in config.json; None where the files cannot be served.
        format: Of most of the weights.
        nbytes: Of the snapshot's files, or the GGUF file and its other shards.
        problem: Why it cannot be served.
    """

    model: str
    revision: str
    architecture: str | None
    format: str | None
    nbytes: int
    path: Path
    problem: str | None


def pull(model: str, revision: str | None, include: Sequence[str]) -> None:
    """Fetch a model and print its path and bytes."""
    hub_id = HubId.parse(model, revision)
    if hub_id is None:
        raise CheckpointError(f"{model!r}: no hub id; expected owner/name, or owner/name:TAG for a GGUF file")
    path = fetch(hub_id, include)
    click.echo(f"{path}  {_size(_bytes_of(path))}")


def list_models(*, as_json: bool) -> None:
    """Print what the cache holds."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found = list(cached_models(Path(HF_HUB_CACHE)))
    if as_json:
        for entry in found:
            click.echo(json.dumps({**attrs.asdict(entry), "path": str(entry.path)}))
        return
    if not found:
        click.echo(f"no models in {HF_HUB_CACHE}; `trio-llm pull OWNER/NAME` fetches one")
        return
    heads = ("MODEL", "REVISION", "ARCHITECTURE", "FORMAT", "SIZE", "PATH, OR WHY IT CANNOT BE SERVED")
    click.echo(columns([heads, *map(_row, found)]))


def _row(entry: CachedModel) -> tuple[str, ...]:
    named = (entry.architecture or "-", entry.format or "-", _size(entry.nbytes))
    return (entry.model, entry.revision[:8], *named, entry.problem or str(entry.path))


def cached_models(cache: Path) -> Iterator[CachedModel]:
    """Yield every snapshot of a model, and every GGUF file in one, by name."""
    for snapshot in sorted(cache.glob("models--*/snapshots/*")):
        repository = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")
        files = sorted(
            path for path in snapshot.rglob("*.gguf") if "-of-" not in path.stem or "-00001-of-" in path.stem
        )
        for path in files:
            yield _inspect(f"{repository}:{path.name}", snapshot.name, path)
        if not files or (snapshot / "config.json").exists():
            yield _inspect(repository, snapshot.name, snapshot)


def _inspect(model: str, revision: str, path: Path) -> CachedModel:
    from trio_llm.model.loading.loader import inspect_model

    size = _bytes_of(path)
    try:
        plan = inspect_model(EngineConfig(model=str(path)))
    except TrioLLMError as error:
        return CachedModel(model, revision, None, None, size, path, " ".join(str(error).split()))
    if path.is_dir() and not has_file(path, "tokenizer.json"):
        return CachedModel(model, revision, plan.architecture, None, size, path, "no tokenizer.json")
    formats: Any = plan.stored_formats
    return CachedModel(model, revision, plan.architecture, max(formats, key=formats.get), size, path, None)


def _bytes_of(path: Path) -> int:
    """Return the bytes of a directory's files, or of a GGUF file and its other shards."""
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    else:
        stem, shard, _ = path.stem.partition("-00001-of-")
        files = list(path.parent.glob(f"{stem}-*-of-*.gguf")) if shard else [path]
    return sum(file.stat().st_size for file in files)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
