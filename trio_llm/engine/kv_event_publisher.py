"""Sends KV events over ZeroMQ from a thread of its own, and sends the last batches again to those who ask.

A message is three frames: topic, number of the batch (8 bytes, big-endian), batch. Who missed batches sends the number
of the first one to the replay socket. The answer is a message per batch that is still kept, then one with number -1.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque
from collections.abc import Sequence

import attrs
import msgspec
import zmq
from prometheus_client import Counter
from zmq import ZMQError

from trio_llm.engine.kv_event_messages import AllBlocksCleared, EventBatch, Move, events_of
from trio_llm.engine.kv_events import KVEventsConfig
from trio_llm.model_info import KVGroup

__all__ = ["EventPublisher", "ZMQError"]

# How long moves are gathered before the thread sends them, so that it rarely takes the GIL. A guess.
_GATHER_S = 0.01
# How long the end of the server waits for subscribers that have not read everything.
_LINGER_MS = 200
_MAX_REQUEST_BYTES = 64
_END = (-1).to_bytes(8, "big", signed=True)
_log = logging.getLogger(__name__)


@attrs.frozen
class _Step:
    """The moves of a step, in order; `anew` if the blocks of before are gone."""

    ts: float
    moves: Sequence[Move]
    anew: bool


class EventPublisher:
    """Publishes what `put` gets.

    Args:
        config: Endpoints and bounds.
        groups: Of the block manager.
        published: Counts batches.
    Raises:
        ZMQError: An endpoint cannot be bound or connected to; the message names it.
    """

    def __init__(self, config: KVEventsConfig, groups: Sequence[KVGroup], published: Counter) -> None:
        self._groups, self._published = groups, published
        self._max_queue_size, self._topic = config.max_queue_size, config.topic.encode()
        self._queue = deque[_Step]()
        self._sent = deque[tuple[int, bytes]](maxlen=config.buffer_steps)
        self._seq = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._context = zmq.Context[zmq.Socket[bytes]]()
        try:
            self._pub = self._socket(zmq.PUB, config.hwm)
            _open(self._pub, config.endpoint, bind=_is_bound(config.endpoint))
            self._replay = None
            if config.replay_endpoint is not None:
                self._replay = self._socket(zmq.ROUTER, config.buffer_steps + 1)
                self._replay.maxmsgsize = _MAX_REQUEST_BYTES
                _open(self._replay, config.replay_endpoint, bind=True)
        except ZMQError:
            self._context.destroy(linger=0)
            raise
        self._waiting, self._closing = False, threading.Event()
        self._woken, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="trio-llm-kv-events", daemon=True)
        self._thread.start()

    def _socket(self, kind: int, hwm: int) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        made.set_hwm(hwm)
        return made

    # --- in the scheduler actor's task ----------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether the queue is at most half full."""
        return len(self._queue) <= self._max_queue_size // 2

    def put(self, ts: float, moves: Sequence[Move], *, anew: bool = False) -> bool:
        """Publish a step's moves soon, after `AllBlocksCleared` if `anew`; False if the queue is full."""
        if len(self._queue) >= self._max_queue_size:
            return False
        self._queue.append(_Step(ts, moves, anew))
        if self._waiting:
            self._waiting = False
            self._waker.send(b"\0")
        return True

    def close(self) -> None:
        """Send what is queued and end the thread."""
        self._closing.set()
        self._waker.send(b"\0")
        self._thread.join()
        self._woken.close()
        self._waker.close()

    # --- in its thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        try:
            while not self._closing.is_set():
                self._waiting = True
                ready = dict(poller.poll(0 if self._queue else None))
                if self._woken.fileno() in ready:
                    self._woken.recv(64)
                if self._replay is not None and self._replay in ready:
                    self._answer(self._replay)
                if self._queue:
                    self._closing.wait(_GATHER_S)
                    self._send_all()
            self._send_all()
        except ZMQError as error:
            _log.error("publishing of KV events ends: %s", error)
        finally:
            self._context.destroy(linger=_LINGER_MS)

    def _send_all(self) -> None:
        while self._queue:
            step = self._queue.popleft()
            events = events_of(step.moves, self._groups)
            batch = EventBatch(step.ts, [AllBlocksCleared(), *events] if step.anew else events, 0)
            payload = self._encoder.encode(batch)
            self._pub.send_multipart((self._topic, self._seq.to_bytes(8, "big"), payload))
            self._sent.append((self._seq, payload))
            self._seq += 1
            self._published.inc()

    def _answer(self, replay: zmq.Socket[bytes]) -> None:
        frames = replay.recv_multipart()
        if len(frames) != 3:
            _log.debug("a replay request of %d frames instead of an empty one and a number", len(frames) - 1)
            return
        client, _, number = frames
        first = int.from_bytes(number, "big")
        for seq, payload in self._sent:
            if seq >= first:
                replay.send_multipart((client, b"", seq.to_bytes(8, "big"), payload))
        replay.send_multipart((client, b"", _END, b""))


def _is_bound(endpoint: str) -> bool:
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))


def _open(made: zmq.Socket[bytes], endpoint: str, *, bind: bool) -> None:
    try:
        if bind:
            made.bind(endpoint)
        else:
            made.connect(endpoint)
    except ZMQError as error:
        raise ZMQError(error.errno, f"{endpoint}: {error.strerror}") from None
