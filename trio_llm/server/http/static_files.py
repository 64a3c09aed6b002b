"""Files of this package for browsers."""

from __future__ import annotations

import hashlib
from pathlib import Path

from quart import Response, request

from trio_llm.server.errors import HttpError

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class StaticFiles:
    """The files of a folder whose names end like a type that a page loads; others, such as licences, are not served.

    Args:
        folder: Its sub-folders count too.
        policy: Content-Security-Policy of every answer.
    """

    def __init__(self, folder: Path, policy: str) -> None:
        self._paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in _TYPES}
        self._headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",  # Ask each time: files of two versions do not mix.
        }

    def answer(self, name: str) -> Response:
        """Answer the current request with a file, or with 304 if the client has it.

        Raises:
            HttpError: 404, there is no such file.
        """
        if (path := self._paths.get(name)) is None:
            raise HttpError(404, f"There is no such file: {name[:80]!r}.")
        content = path.read_bytes()
        tag = hashlib.sha256(content).hexdigest()[:32]
        headers = {**self._headers, "ETag": f'"{tag}"'}
        if request.if_none_match.contains_weak(tag):
            return Response(b"", status=304, headers=headers)
        return Response(content, content_type=_TYPES[path.suffix], headers=headers)
