"""The model: checkpoints, layers, attention over the paged KV cache, sampler, runner (floor 2: torch)."""

import os

# For how long OpenMP's threads wait actively after an operation of torch, in loops of about 15 ns. libgomp's default is
# some milliseconds, in which they take cores from the kernels' own threads. It is read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
