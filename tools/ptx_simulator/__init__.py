"""Runs the PTX that the compiler makes of a kernel on a CPU, one numpy lane per CUDA thread.

What it proves: the kernel's arithmetic and addressing, its inline assembly, its barriers and asynchronous copies
(three orders of warps, shared memory that starts as NaN, copies that land only when they are waited for), its
bounds. What it cannot: the machine code made of the PTX, the accuracy of approximate instructions, any speed.
Whatever it does not know (an opcode, a modifier, a divergent shuffle) raises `UnsupportedError` instead of guessing.
"""

from tools.ptx_simulator.errors import KernelFaultError, UnsupportedError
from tools.ptx_simulator.launcher import SimulatedLauncher

__all__ = ["KernelFaultError", "SimulatedLauncher", "UnsupportedError"]
