"""Read an uploaded file from a multipart body as it arrives: written to disk chunk by chunk, never whole in memory."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable

import attrs
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from trio_llm.errors import InvalidRequestError
from trio_llm.server.errors import HttpError

_MAX_FIELD_BYTES = 4096
_MAX_PARTS = 32
# The decoder gets pieces of this size and buffers at most two: by then it must have found the headers of a part.
_PIECE_BYTES = 64 * 1024


@attrs.define
class Upload:
    """The other fields of an upload's form.

    Attributes:
        filename: The client's name of the file; never part of a path on this server.
        fields: The other fields, by name.
    """

    filename: str | None = None
    fields: dict[str, str] = attrs.field(factory=dict[str, str])


async def read_upload(
    content_type: str | None, chunks: AsyncIterable[bytes], write: Callable[[bytes], Awaitable[None]]
) -> Upload:
    """Read a multipart/form-data body with one part named "file", and pass its bytes to `write` as they arrive.

    Raises:
        HttpError: 415, it is not multipart/form-data.
        InvalidRequestError: It is malformed, or has no file or more than one.
    """
    media_type, options = parse_options_header(content_type)
    boundary = options.get("boundary", "").encode("latin-1", "replace")
    if media_type != "multipart/form-data" or not boundary:
        raise HttpError(415, "An upload is multipart/form-data with the fields `file` and `purpose`.")
    decoder = MultipartDecoder(boundary, max_form_memory_size=2 * _PIECE_BYTES, max_parts=_MAX_PARTS)
    reader = _Reader(write)
    try:
        async for chunk in chunks:
            for start in range(0, len(chunk), _PIECE_BYTES):
                decoder.receive_data(chunk[start : start + _PIECE_BYTES])
                await reader.read(decoder)
        decoder.receive_data(None)
        await reader.read(decoder)
    except (ValueError, RequestEntityTooLarge):
        raise InvalidRequestError("The multipart body is malformed or has too many or too large fields.") from None
    if reader.upload.filename is None:
        raise InvalidRequestError("Missing required parameter: 'file'.", param="file")
    return reader.upload


class _Reader:
    """Reads the parts of a body: the file to `write`, the fields into memory."""

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        self.upload = Upload()
        self._write = write
        self._field: str | None = None

    async def read(self, decoder: MultipartDecoder) -> None:
        """Process the decoder's events."""
        while not isinstance(event := decoder.next_event(), NeedData | Epilogue):
            if isinstance(event, File):
                if event.name != "file" or self.upload.filename is not None:
                    raise InvalidRequestError("An upload has one file, in the field `file`.", param="file")
                self.upload.filename = (event.filename or "upload")[:255]
                self._field = None
            elif isinstance(event, Field):
                if not isinstance(event.name, str) or event.name in self.upload.fields:  # pyright: ignore[reportUnnecessaryIsInstance] - it may be None
                    raise InvalidRequestError("Each part of the form has a name of its own.", param="file")
                self._field = event.name
                self.upload.fields[event.name] = ""
            elif isinstance(event, Data) and self._field is None:
                await self._write(event.data)
            elif isinstance(event, Data) and self._field is not None:
                self.upload.fields[self._field] += event.data.decode("utf-8", "replace")
                if len(self.upload.fields[self._field]) > _MAX_FIELD_BYTES:
                    raise ValueError("a form field is too long")
