"""What reading and packing weights frees goes back to the system at once."""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from contextlib import contextmanager, suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of malloc.h


@contextmanager
def returned_at_once() -> Generator[None]:
    """Map what is allocated meanwhile from 128 KiB on.

    glibc begins so, but as larger mappings are freed it takes up to 32 MiB from the heap. It keeps what is freed there,
    and after a few small tensors beside it the next matrix does not fit in: it kept more than half the size of all
    weights. Afterwards the limits are the ones that it comes to by itself.
    """
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # other C libraries lack the call
        libc.mallopt(_MMAP_THRESHOLD, 2**17)
    try:
        yield
    finally:
        with suppress(AttributeError):
            libc.mallopt(_MMAP_THRESHOLD, 2**25)
            libc.mallopt(_TRIM_THRESHOLD, 2**26)
