"""Each CPU kernel against float64, on one thread and on several."""

from __future__ import annotations

import pytest
import torch

from cpu_kernels import library
from tests.cpu_kernels.cases import CHECKS, poisoned


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CHECKS)
def test_kernels_compute_what_they_say(name: str, threads: int) -> None:
    """Shapes, strides, windows and dtypes of the check; outputs are poisoned before."""
    torch.manual_seed(threads)
    library.set_num_threads(threads)
    try:
        with poisoned():
            CHECKS[name]()
    finally:
        library.set_num_threads(library.default_threads())


def test_arguments_are_checked() -> None:
    """A tensor of another dtype than the source declares is refused before the kernel sees it."""
    with pytest.raises(TypeError, match=r"rope_angles: torch\.int32 where torch\.int64 is declared"):
        library.kernels()["rope_angles"](
            torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.ones(1), torch.ones(1), 1, 1, 1.0
        )
