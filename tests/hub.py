"""A stand-in for the Hugging Face hub: the parts of its API that huggingface_hub asks, with faults on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import attrs
import pytest

_API = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_RANGE = re.compile(r"bytes=(\d+)-")
LARGE = 1000  # bytes from which the hub answers with a redirect to its storage, on another host


def commit(revision: str) -> str:
    """Return the commit of a branch."""
    return hashlib.sha1(revision.encode()).hexdigest()


@attrs.define
class Hub:
    """What is served, and what was asked for.

    Attributes:
        repositories: owner/name -> branch -> file -> content.
        fault: Called with the path; a status and X-Error-Code to answer with in place of the content, or None.
        cut: Answers of files end after this many bytes, this many times: [bytes, times].
        asked: Method and path of every request.
        ranges: The first byte of every file request that does not begin at the beginning.
        agents: User-Agent of all requests.
        tokens: Authorization of every request for what the hub itself serves.
    """

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = attrs.field(factory=dict)
    fault: Callable[[str], tuple[int, str] | None] = lambda path: None
    cut: list[int] = attrs.field(factory=lambda: [0, 0])
    asked: list[str] = attrs.field(factory=list)
    ranges: list[int] = attrs.field(factory=list)
    agents: set[str | None] = attrs.field(factory=set)
    tokens: set[str | None] = attrs.field(factory=set)

    def add(self, repository: str, files: dict[str, bytes] | Path, revision: str = "main") -> None:
        """Serve files, or those of a directory."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        self.repositories.setdefault(repository, {})[revision] = files

    def find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and files of a branch or commit."""
        for branch, files in self.repositories.get(repository, {}).items():
            if revision in (branch, commit(branch)):
                return commit(branch), files
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)  # pyright: ignore[reportArgumentType]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        self.hub.agents.add(self.headers["User-Agent"])
        if (fault := self.hub.fault(path)) is not None:
            self._send(fault[0], {"X-Error-Code": fault[1]} if fault[1] else {})
        elif path.startswith("/storage/"):
            owner, repository, revision, name = path.removeprefix("/storage/").split("/", 3)
            repository = f"{owner}/{repository}"
            found = self.hub.find(repository, revision)
            assert found is not None
            self._send_file(found[1][name], {"ETag": '"storage"'})
        elif match := _API.fullmatch(path):
            self._send_listing(match["id"], match["what"], match["revision"] or "main")
        elif match := _FILE.fullmatch(path):
            self.hub.tokens.add(self.headers["Authorization"])
            self._resolve(match["id"], match["revision"], match["name"])
        else:
            self._send(404, {})

    def _send_listing(self, repository: str, what: str | None, revision: str) -> None:
        if repository not in self.hub.repositories:
            return self._send(401, {"X-Error-Code": "RepoNotFound"})  # so as not to tell which private ones exist
        found = self.hub.find(repository, revision)
        if found is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        sha, files = found
        if what == "tree":
            listing: object = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
        else:
            listing = {"id": repository, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
        return self._send(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        found = self.hub.find(repository, revision)
        if found is None or name not in found[1]:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        sha, content = found[0], found[1][name]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag}
        if len(content) < LARGE:
            return self._send_file(content, headers)
        location = self.hub.url.replace("127.0.0.1", "localhost") + f"/storage/{repository}/{sha}/{name}"
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content)), "Location": location}
        return self._send(302, {**headers, **linked})

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        first = int(match[1]) if (match := _RANGE.fullmatch(self.headers["Range"] or "")) else 0
        if first:
            self.hub.ranges.append(first)
            headers = {**headers, "Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
        whole = content[first:]
        cut_at, times = self.hub.cut
        if self.command == "GET" and times and len(whole) > cut_at:
            self.hub.cut[1] -= 1
            self.close_connection = True
            return self._send(206 if first else 200, {**headers, "Content-Length": str(len(whole))}, whole[:cut_at])
        return self._send(206 if first else 200, headers, whole)

    def _send(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def open_hub(cache: Path) -> Iterator[Hub]:
    """Serve a hub on this machine, and point huggingface_hub at it, with a cache and without a token of its own."""
    import huggingface_hub
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
        patch.setattr(constants, "AGENT_HARNESSES_PATH", str(cache / "no harnesses"))
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
        patch.setattr("time.sleep", lambda _: None)  # between attempts
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()
