"""Memory for packed weights: matrices side by side in huge pages.

A step reads every weight once. In pages of 4 KiB, finding these costs a quarter of the time, most of all in a virtual
machine; matrices are smaller than a huge page of 2 MiB, so several share one.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_CHUNK = 32 * _HUGE_PAGE  # reserved at a time; only pages that are written to take memory
_ALIGNMENT = 64  # a cache line

_lock = threading.Lock()
_chunk: weakref.ref[mmap.mmap] | None = None  # the newest one, freed with the last tensor in it
_used = 0  # bytes of it


def empty(shape: tuple[int, ...]) -> Tensor:
    """Return uninitialised bytes that last as long as a model, in huge pages where the system has them."""
    num_bytes = math.prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE") or not num_bytes:
        return torch.empty(shape, dtype=torch.uint8)
    chunk, first = _reserve(num_bytes) if num_bytes > _CHUNK else _take(num_bytes)
    return torch.frombuffer(chunk, dtype=torch.uint8, count=num_bytes, offset=first).view(shape)


def _take(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Return the newest chunk, or a new one if that is full, and where in it so many bytes are free."""
    global _chunk, _used  # noqa: PLW0603 - one memory a process
    with _lock:
        chunk = _chunk() if _chunk is not None else None
        if chunk is None or _used + num_bytes > len(chunk):
            chunk, _used = _reserve(_CHUNK)
            _chunk = weakref.ref(chunk)
        first = _used
        _used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return chunk, first


def _reserve(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Return new memory for so many bytes, and where its first huge page begins."""
    chunk = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        chunk.madvise(mmap.MADV_HUGEPAGE)
    return chunk, -torch.frombuffer(chunk, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
