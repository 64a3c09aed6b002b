"""What rank 0 and the other ranks send each other, over a pair of Unix sockets: msgpack behind its length.

Commands go to the ranks, reports come back. Nothing in them can be code: each side decodes into the classes below.
"""

from __future__ import annotations

import socket
from typing import Generic, TypeVar

import msgspec

from trio_llm.config import EngineConfig

T = TypeVar("T")
_LENGTH_BYTES = 8


class Load(msgspec.Struct, tag="load", frozen=True):
    """Load a part of the model. The first command.

    Attributes:
        config: Its model is a path; its dtype and device are decided.
        meeting_place: The file through which the ranks find each other.
        as_stored: As in ModelPlan, the same on all ranks.
    """

    config: EngineConfig
    rank: int
    meeting_place: str
    as_stored: bool


class Connect(msgspec.Struct, tag="connect", frozen=True):
    """Connect to the other ranks: every rank has loaded its part. On a GPU, measure steps and report `Measured`."""


class Start(msgspec.Struct, tag="start", frozen=True):
    """Allocate the KV pool, and record decodes."""

    num_blocks: int
    max_model_len: int


class Forward(msgspec.Struct, tag="forward", frozen=True):
    """Run the layers over a ragged batch, whose token ids follow in a broadcast. Columns are numpy's bytes, in int64.

    Attributes:
        rows: Permanent rows, whose block tables the ranks keep.
        starts, counts: Per row, position of its first token and number of its tokens.
        additions: What the step adds to block tables: per KV group places, in int64, and blocks, in int32.
    """

    rows: bytes
    starts: bytes
    counts: bytes
    additions: list[bytes]


class Decodes(msgspec.Struct, tag="decodes", frozen=True):
    """Replay the graph of `size` single tokens, which follow in a broadcast with their rows and positions.

    Attributes:
        additions: As in `Forward`.
    """

    size: int
    additions: list[bytes]


class Logits(msgspec.Struct, tag="logits", frozen=True):
    """Compute a part of the logits of `num_rows` hidden states, which follow in a broadcast."""

    num_rows: int


class Loading(msgspec.Struct, tag="loading", frozen=True):
    """A sign of life while a rank loads."""


class Loaded(msgspec.Struct, tag="loaded", frozen=True):
    """The rank's weights are in memory."""


class Measured(msgspec.Struct, tag="measured", frozen=True):
    """What a rank measured on its GPU, with its weights loaded.

    Attributes:
        workspace_bytes: Memory of the largest steps.
        usable_bytes: That may be allocated for steps and the KV pool.
    """

    workspace_bytes: int
    usable_bytes: int


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The last report of a rank that ends.

    Attributes:
        kind: The exception's class.
        by_others: A collective failed, so the cause is another rank's.
    """

    kind: str
    text: str
    by_others: bool


Command = Load | Connect | Start | Forward | Decodes | Logits
Report = Loading | Loaded | Measured | Failed


class Channel(Generic[T]):
    """One end of a pair of sockets, from which messages of T are read."""

    def __init__(self, end: socket.socket, received: object) -> None:
        self._socket = end
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(received)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Command | Report) -> None:
        """Send a message; wait as long as the socket's timeout says.

        Raises:
            OSError: The other end is closed, or does not read.
        """
        data = self._encoder.encode(message)
        self._socket.sendall(len(data).to_bytes(_LENGTH_BYTES, "little") + data)

    def receive(self) -> T | None:
        """Wait for the next message; None if the other end is closed."""
        head = self._read(_LENGTH_BYTES)
        data = head and self._read(int.from_bytes(head, "little"))
        return self._decoder.decode(data) if data else None

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._socket.recv(size - len(data))
            except ConnectionError:
                return b""
            if not part:
                return b""
            data += part
        return bytes(data)

    def close(self) -> None:
        self._socket.close()
