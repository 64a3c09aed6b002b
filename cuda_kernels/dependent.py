"""Put a kernel into a CUDA graph such that it may begin while the one before it runs: programmatic dependent launch.

CuPy has no launch with attributes; NVIDIA's own bindings of the driver have. What the kernel does meanwhile is its own
part of the bargain: see `wait_for_kernels_before` in common.cuh. The module knows neither kernels nor tensors.
Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

OLDEST = (9, 0)  # compute capability
_TYPES = {int: ctypes.c_void_p, np.int32: ctypes.c_int32, np.float32: ctypes.c_float, np.uint64: ctypes.c_uint64}

_log = logging.getLogger(__name__)


@functools.cache
def driver() -> Any | None:
    """Return the driver's bindings; None, which is logged once, where they are not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        _log.warning("cuda.bindings cannot be imported (%s): each kernel of a graph waits for the one before", error)
        return None


def launch(
    bindings: Any,
    function: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    stream: int,
    args: Sequence[Any],
) -> None:
    """Launch a function on a stream that is being captured.

    Args:
        function: The CUfunction.
        args: As for CuPy: pointers as int, None for a null pointer, numpy scalars of the declared size.
    Raises:
        cupy.cuda.driver.CUDADriverError: As of CuPy's own launch.
    """
    attribute = bindings.CUlaunchAttribute()
    attribute.id = bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = bindings.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    config.attrs, config.numAttrs = [attribute], 1
    values = tuple(0 if arg is None else arg if isinstance(arg, int) else arg.item() for arg in args)
    types = tuple(ctypes.c_void_p if arg is None else _TYPES[type(arg)] for arg in args)
    (status,) = bindings.cuLaunchKernelEx(config, function, (values, types), 0)
    if status:
        import cupy  # pyright: ignore[reportMissingImports] - an extra

        raise cupy.cuda.driver.CUDADriverError(int(status))
