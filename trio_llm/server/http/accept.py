"""Accept connections, many at once, and answer probes as they are accepted.

Under load, a pass of the event loop wakes hundreds of tasks and takes tens of milliseconds. An ordinary request needs a
dozen passes, and a probe of the server's health would need a second. So the listening socket is looked at between the
steps of tasks, not once in a pass, and a probe is answered there, before it has a task of its own.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

import attrs
import trio

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.005
_MAX_PER_LOOK = 64
_MAX_PER_PASS = 128
# Accepted, and not started yet. The others wait in the kernel.
_MAX_WAITING = 1024
_PEEK_BYTES = 4096
_RETRY_S = 0.1
_LOG_INTERVAL_S = 60.0
_NO_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


Handle = Callable[[trio.SocketStream], Awaitable[object]]


@attrs.frozen
class ProbeAnswer:
    """The answer to a probe.

    Attributes:
        request_bytes: Length of the request.
        data: The whole response.
        closes: No other request may follow on this connection.
    """

    request_bytes: int
    data: bytes
    closes: bool


AnswerProbe = Callable[[bytes, str], ProbeAnswer | None]
"""From the first bytes of a connection and the peer's address to an answer; None if it is no probe, or not yet."""


def contained(answer_probe: AnswerProbe) -> AnswerProbe:
    """Return the same, which leaves a probe to the app where it fails."""

    def answer(head: bytes, peer: str) -> ProbeAnswer | None:
        try:
            return answer_probe(head, peer)
        except Exception as error:
            logger.error("a probe is answered by the app", exc_info=error)
            return None

    return answer


async def accept_connections(
    listener: trio.SocketListener,
    handle: Handle,
    nursery: trio.Nursery,
    answer_probe: AnswerProbe = lambda _head, _peer: None,
) -> None:
    """Start `handle` in `nursery` for every connection until cancelled, then close `listener`."""
    # The same listening socket; Trio's own object has no accept that returns at once.
    with socket.socket(fileno=os.dup(listener.socket.fileno())) as sock:
        sock.setblocking(False)
        acceptor = Acceptor(sock, handle, nursery, answer_probe)
        async with listener, trio.open_nursery() as tasks:
            trio.lowlevel.add_instrument(acceptor)
            try:
                tasks.start_soon(acceptor.start_accepted)
                await acceptor.accept()
            finally:
                trio.lowlevel.remove_instrument(acceptor)
                acceptor.start_all()


@attrs.define(eq=False)
class Acceptor(trio.abc.Instrument):
    """Accepts the connections of one listening socket, also in the middle of a pass of the event loop."""

    _sock: socket.socket
    _handle: Handle
    _nursery: trio.Nursery
    _answer_probe: AnswerProbe
    # The first bytes have come, and are no probe; and not yet.
    _begun: deque[socket.socket] = attrs.field(factory=deque[socket.socket], init=False)
    _silent: deque[socket.socket] = attrs.field(factory=deque[socket.socket], init=False)
    _one_waits: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)
    _next_look_s: float = attrs.field(default=-math.inf, init=False)
    _log_silent_until_s: float = attrs.field(default=-math.inf, init=False)

    async def accept(self) -> None:
        """Look at the socket whenever a connection arrives."""
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            if not self.look() or len(self._begun) + len(self._silent) >= _MAX_WAITING:
                await trio.sleep(_RETRY_S)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - the name is Trio's
        """Look at the socket, often enough, before a task goes on; Trio calls this."""
        if time.perf_counter() >= self._next_look_s:
            self.look()

    def look(self) -> bool:
        """Accept what waits and answer probes; return False if the process has no resources for a connection."""
        for _ in range(len(self._silent)):
            self._sort(self._silent.popleft())
        accepted = self._accept_some()
        self._next_look_s = time.perf_counter() + _LOOK_EVERY_S
        if self._begun or self._silent:
            self._one_waits.unpark()
        return accepted

    async def start_accepted(self) -> None:
        """Start what was accepted, at most `_MAX_PER_PASS` connections in a pass of the event loop."""
        while True:
            if not self._begun and not self._silent:
                await self._one_waits.park()
            for _ in range(min(_MAX_PER_PASS, len(self._begun) + len(self._silent))):
                self._start((self._begun or self._silent).popleft())
            await trio.lowlevel.checkpoint()

    def start_all(self) -> None:
        """Start what was accepted, before the listener is closed."""
        for connection in (*self._begun, *self._silent):
            self._start(connection)
        self._begun.clear()
        self._silent.clear()

    def _accept_some(self) -> bool:
        for _ in range(min(_MAX_PER_LOOK, _MAX_WAITING - len(self._begun) - len(self._silent))):
            try:
                connection, _address = self._sock.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _NO_RESOURCES:
                    self._log(error)
                    return False
                continue  # An error of this one connection before it was accepted; see accept(2).
            connection.setblocking(False)
            self._sort(connection)
        return True

    def _sort(self, connection: socket.socket) -> None:
        """Answer a probe; let any other connection wait for its start."""
        try:
            head = connection.recv(_PEEK_BYTES, socket.MSG_PEEK)
            answer = self._answer_probe(head, connection.getpeername()[0]) if head else None
        except BlockingIOError:
            self._silent.append(connection)
            return
        except OSError:  # The client has disconnected.
            connection.close()
            return
        if answer is not None:
            with suppress(OSError):
                connection.recv(answer.request_bytes)
                connection.send(answer.data)  # A new connection has room for it.
            if answer.closes:
                connection.close()
                return
        (self._begun if answer is None else self._silent).append(connection)

    def _start(self, connection: socket.socket) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        self._nursery.start_soon(_run, self._handle, stream)

    def _log(self, error: OSError) -> None:
        """Log why nothing can be accepted, not at each of ten attempts a second."""
        if (now_s := trio.current_time()) >= self._log_silent_until_s:
            self._log_silent_until_s = now_s + _LOG_INTERVAL_S
            logger.error("cannot accept connections, trying every %g s: %s", _RETRY_S, error.strerror)


async def _run(handle: Handle, stream: trio.SocketStream) -> None:
    try:
        await handle(stream)
    finally:
        await trio.aclose_forcefully(stream)
