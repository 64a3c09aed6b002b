"""Repositories of the Hugging Face hub, fetched into its own cache by huggingface_hub; each failure is one line.

Only what trio-llm reads is fetched: no pickles, no second copy of the weights in another format.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import attrs

from trio_llm.errors import CheckpointError

_log = logging.getLogger(__name__)

# The hub allows 96 characters of owner and name together.
_REPOSITORY = re.compile(r"(?P<repository>[\w-][\w.-]{0,94}/[\w-][\w.-]{0,94}?)(?::(?P<tag>[\w.-]{1,128}))?")
_SMALL_FILES = (".json", ".jinja", ".model", ".txt")
_NOT_MODELS = ("mmproj", "imatrix")  # GGUF files that belong to a model: image projectors, calibration data
_SHARD = re.compile(r"-(?P<number>\d{5})-of-\d{5}$")
_MAX_LISTED = 20


@attrs.frozen
class HubId:
    """A model on the hub.

    Attributes:
        repository: owner/name.
        tag: Which of the repository's GGUF files: a part of the name, like Q4_K_M. None for safetensors, or the only
            GGUF file.
        revision: Branch, tag or commit; None for the default branch.
    """

    repository: str
    tag: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> HubId | None:
        """Read owner/name or owner/name:TAG; return None if it is neither."""
        match = _REPOSITORY.fullmatch(text)
        return None if match is None else cls(match["repository"], match["tag"], revision)

    @property
    def model(self) -> str:
        """owner/name or owner/name:TAG."""
        return f"{self.repository}:{self.tag}" if self.tag else self.repository

    def __str__(self) -> str:
        return f"{self.model} at {self.revision}" if self.revision else self.model


def fetch(hub_id: HubId, include: Sequence[str] = ()) -> Path:
    """Download what is not in the cache yet; return the directory, or the GGUF file (of several shards the first).

    Files that are complete are never fetched twice; a connection that breaks is resumed where it stopped.

    Args:
        include: Patterns of files to fetch in place of those that trio-llm reads.
    Raises:
        CheckpointError: Not found, not allowed, not reachable, or not stored; says what to do.
    """
    huggingface_hub = _library()
    # Passed explicitly because huggingface_hub reads the variable only at its first import.
    endpoint = os.environ.get("HF_ENDPOINT")
    _log.info("%s is not a directory here: taken from %s", hub_id, endpoint or "the hub")
    place: dict[str, Any] = {"repo_id": hub_id.repository, "revision": hub_id.revision, "endpoint": endpoint}
    try:
        names = _names(place)
        wanted = [name for name in names if any(fnmatchcase(name, pattern) for pattern in include)]
        if include and not wanted:
            raise CheckpointError(f"{hub_id}: no file matches {', '.join(include)}; there are {_listed(names)}")
        wanted = wanted or select(hub_id, names)
        directory = Path(huggingface_hub.snapshot_download(**place, allow_patterns=wanted))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{hub_id}: {explain(error, hub_id, endpoint)}") from error
    first = PurePosixPath(wanted[0])
    return directory / first if first.suffix == ".gguf" and not include else directory


def _library() -> ModuleType:
    """Import huggingface_hub, which then tells the hub neither the version of torch nor what agent runs it."""
    import huggingface_hub
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    return huggingface_hub


def _names(place: dict[str, Any]) -> list[str]:
    """Return the repository's files; those in the cache where the hub does not answer."""
    try:
        api = _library().HfApi(endpoint=place["endpoint"])
        return sorted(
            file.rfilename for file in api.model_info(place["repo_id"], revision=place["revision"]).siblings or ()
        )
    except Exception as error:
        if names := _cached_names(place["repo_id"], place["revision"]):
            return names
        raise error


def _cached_names(repository: str, revision: str | None) -> list[str]:
    """Return the files of a repository when it was last fetched, whether or not all of them were; none if unknown."""
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return sorted(file.path for file in _library().get_cached_repo_tree(repository, revision=revision))
    except CachedRepoTreeNotFoundError:
        return []


def select(hub_id: HubId, names: Sequence[str]) -> list[str]:
    """Choose the files that trio-llm reads; if they are GGUF, only the shards of one model, in their order.

    Raises:
        CheckpointError: There is no model, or there are several; lists them.
    """
    stems = {name: PurePosixPath(name).stem for name in names if name.endswith(".gguf")}
    models = {
        name: stem
        for name, stem in stems.items()
        if not stem.lower().startswith(_NOT_MODELS)
        and ((part := _SHARD.search(stem)) is None or part["number"] == "00001")
    }
    if hub_id.tag is None and ("config.json" in names or not models):
        return _safetensors(hub_id, names)
    tag = hub_id.tag or ""
    chosen = [name for name, stem in models.items() if not tag or _has_tag(stem, name, tag)]
    if len(chosen) != 1:
        what = f"{len(chosen)} GGUF files{' of this tag' if tag else ''}" if chosen else "no GGUF file of this tag"
        raise CheckpointError(
            f"{hub_id}: {what}; name one as {hub_id.repository}:TAG, a part of the file's name, "
            f"like Q4_K_M: {_listed(sorted(chosen or models))}"
        )
    stem = _SHARD.sub("", models[chosen[0]])
    folder = PurePosixPath(chosen[0]).parent
    return [chosen[0], *(name for name, other in sorted(stems.items()) if name != chosen[0] and _SHARD.search(other)
            and _SHARD.sub("", other) == stem and PurePosixPath(name).parent == folder)]  # fmt: skip


def _has_tag(stem: str, name: str, tag: str) -> bool:
    """Say whether a file's name, without its shard's number, holds the tag as whole words."""
    bounded = re.compile(rf"(?<![^\W_]){re.escape(tag)}(?![\w])", re.IGNORECASE)
    return tag in (name, PurePosixPath(name).name) or bounded.search(_SHARD.sub("", stem)) is not None


def _safetensors(hub_id: HubId, names: Sequence[str]) -> list[str]:
    if "config.json" not in names:
        raise CheckpointError(f"{hub_id}: not a checkpoint, it has no config.json; there are {_listed(names)}")
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if any(name.startswith("model") for name in weights):  # Mistral's repositories hold them twice
        weights = [name for name in weights if not name.startswith("consolidated")]
    small = [name for name in names if name.endswith(_SMALL_FILES) and ("/" not in name or name.endswith(".jinja"))]
    return [*small, *weights]


_UNREACHABLE = {"ConnectError", "TimeoutException", "ProxyError", "OfflineModeIsEnabled"}
_BROKEN = {"RemoteProtocolError", "ReadError", "IncompleteRead", "ProtocolError"}


def _kinds(error: BaseException | None) -> set[str]:
    """Return the names of an error's classes: huggingface_hub has changed its HTTP library, but not these."""
    return set() if error is None else {kind.__name__ for kind in type(error).__mro__}


def explain(error: Exception, hub_id: HubId, endpoint: str | None) -> str:
    """Say in one line what went wrong and what to do."""
    from huggingface_hub import constants

    hub = (endpoint or constants.ENDPOINT).rstrip("/")
    kinds = _kinds(error)
    if "LocalEntryNotFoundError" in kinds and error.__cause__ is not None:
        # The hub could not be asked, and the cache does not have it.
        return explain(error.__cause__, hub_id, endpoint) if isinstance(error.__cause__, Exception) else str(error)
    if "OfflineModeIsEnabled" in kinds or "LocalEntryNotFoundError" in kinds:
        return (
            f"not complete in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set: "
            f"unset it, or run `trio-llm pull {hub_id.model}` with a network"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {constants.HF_HUB_CACHE} is full: free some space, or set HF_HOME to another disk"
    if isinstance(error, PermissionError):
        return f"{error.filename or constants.HF_HUB_CACHE} cannot be written: set HF_HOME to a directory of yours"
    if kinds & _UNREACHABLE:
        return f"not in the cache, and {hub} cannot be reached: check the network, the proxy and HF_ENDPOINT"
    if kinds & _BROKEN or "Consistency check failed" in str(error):
        return "the download broke off: run it again; files that are complete are not fetched again"
    return _refusal(error, kinds, hub_id, hub)


def _refusal(error: Exception, kinds: set[str], hub_id: HubId, hub: str) -> str:
    """Explain what the hub answered."""
    from huggingface_hub import get_token

    page, status = f"{hub}/{hub_id.repository}", getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in kinds or status == 403:
        if get_token() is None:
            return (
                f"gated: accept its conditions at {page}, then set HF_TOKEN to a token of yours ({hub}/settings/tokens)"
            )
        return f"your token may not read it: accept its conditions at {page}, or use another HF_TOKEN"
    if "RevisionNotFoundError" in kinds:
        return f"no such revision; {page}/commits/main lists them"
    if "RepositoryNotFoundError" in kinds:
        return (
            f"{hub} has no such repository, or it is private: check the spelling, or set HF_TOKEN to a token of yours"
        )
    if "DisabledRepoError" in kinds:
        return f"the hub has disabled this repository; see {page}"
    if status == 401:
        return f"the hub does not know your token: set HF_TOKEN to a valid one ({hub}/settings/tokens), or unset it"
    if status == 429:
        return "the hub limits your requests: wait some minutes and run it again; with HF_TOKEN set the limit is higher"
    if status is not None and status >= 500:
        return f"the hub answers {status}: try again later"
    return f"the hub says: {error}"


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _MAX_LISTED} more"] if len(names) > _MAX_LISTED else []
    return ", ".join([*names[:_MAX_LISTED], *more]) or "no files"
