"""What reaches a kernel is exactly what it declares, or nothing is launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cuda_kernels import launch
from cuda_kernels.launch import CupyLauncher, check, kernel, using

NORM = kernel("norm.cu", "rms_norm", HIDDEN=64, THREADS=32)


def good() -> list[Any]:
    """Return arguments that fit rms_norm."""
    return [*(torch.zeros(2, 64, dtype=torch.bfloat16) for _ in range(3)), 64, 1e-6]


def test_numbers_become_what_the_declaration_says() -> None:
    """A Python float reaches a float parameter as float32, an int an int parameter as int32; tensors stay."""
    *tensors, stride, eps = check(NORM, good())
    assert all(a is b for a, b in zip(tensors, check(NORM, [*tensors, 64, 1e-6]), strict=False))
    assert type(stride) is np.int32 and type(eps) is np.float32 and eps == np.float32(1e-6)
    assert type(check(NORM, [*good()[:4], 1])[4]) is np.float32


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (0, 5, "argument x: expected a tensor, got 5"),
        (0, torch.zeros(2, 64), "argument x: expected torch.bfloat16, got torch.float32"),
        (3, 64.0, "argument row_stride: expected int, got 64.0"),
        (3, True, "argument row_stride: expected int, got bool"),
        (4, None, "argument eps: expected float, got NoneType"),
        (4, torch.ones(()), "argument eps: expected float, got Tensor"),
    ],
)
def test_wrong_arguments_are_refused_by_name(place: int, value: object, match: str) -> None:
    """A mistake names kernel, argument, what was expected and what came."""
    args = good()
    args[place] = value
    with pytest.raises(TypeError, match=match):
        check(NORM, args)


def test_too_few_and_too_big_arguments_are_refused() -> None:
    """The number of arguments must be right, and an int must fit."""
    with pytest.raises(TypeError, match="takes 5 arguments, got 4"):
        check(NORM, good()[:4])
    with pytest.raises(OverflowError):
        check(NORM, [*good()[:3], 2**31, 1e-6])


def test_dtypes_follow_the_specialisation() -> None:
    """A kernel specialised for float16 takes float16 activations."""
    fp16 = kernel("norm.cu", "rms_norm", HIDDEN=64, THREADS=32, IO_FP16=1)
    args: list[Any] = [*(torch.zeros(2, 64, dtype=torch.float16) for _ in range(3)), 64, 1e-6]
    assert check(fp16, args)[0] is args[0]
    with pytest.raises(TypeError, match=r"expected torch\.float16"):
        check(fp16, good())


def test_rows_that_no_16_byte_load_can_read_are_unfit() -> None:
    """A dtype, a stride or a beginning that a kernel's loads would fault on is named before anything is launched."""
    x = torch.zeros(4, 24, dtype=torch.bfloat16)
    assert launch.unfit(x) is None and launch.unfit(x[:, 8:16]) is None
    assert launch.unfit(x.double()) == "dtype torch.float64"
    for bad in (x[:, 1:9], x.T, torch.zeros(4, 20, dtype=torch.bfloat16)):
        assert launch.unfit(bad) == "rows that do not begin at 16 bytes"


class Recorder:
    """Remembers launches."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def launch(self, kernel: object, grid: object, block: object, shared_bytes: int, args: Sequence[Any]) -> None:
        self.calls.append((grid, block, shared_bytes, *args))


def test_an_empty_grid_is_not_launched() -> None:
    """No rows, no launch: CUDA refuses an empty grid."""
    recorder = Recorder()
    with using(recorder):
        NORM((0, 1, 1), (32, 1, 1), 0, *good())
        assert recorder.calls == []
        NORM((2, 1, 1), (32, 1, 1), 16, *good())
    assert recorder.calls[0][:3] == ((2, 1, 1), (32, 1, 1), 16)
    assert isinstance(launch._launcher, CupyLauncher)
