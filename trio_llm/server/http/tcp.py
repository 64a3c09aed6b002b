"""What the kernel knows of a TCP connection, where it is Linux."""

from __future__ import annotations

import fcntl
import socket
import sys

import trio

_SIOCOUTQNSD = 0x894B  # Bytes not sent yet. Acknowledgements may come late, so bytes in flight do not count.


def queued_bytes(sock: trio.socket.SocketType) -> int:
    """Return how many bytes the kernel still holds back because the peer has not read; 0 where it does not say."""
    if sys.platform != "linux" or sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return 0
    return int.from_bytes(fcntl.ioctl(sock.fileno(), _SIOCOUTQNSD, bytes(4)), sys.byteorder)


def detect_dead_peers(sock: trio.socket.SocketType, timeout_s: float) -> None:
    """Notice a peer that is gone within about `timeout_s`."""
    if sys.platform == "linux" and sock.family in {socket.AF_INET, socket.AF_INET6}:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        # Also the way out for plain hypercorn's endless write, see trio_llm.asgi.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))
