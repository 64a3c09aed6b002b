"""Prepare a decode step: simulated, and compared with the operations of torch that it stands for."""

from __future__ import annotations

import pytest
import torch

from cuda_kernels import step
from cuda_kernels.launch import using
from tests.kernels.helpers import simulate
from tools.kernel_lab.cases import all_checks, judge
from tools.ptx_simulator import SimulatedLauncher
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.paged.kv_cache import AttentionSpec, plan_kv
from trio_llm.model.paged.rope import Rope


def test_it_is_right_to_the_last_bit_but_for_angles() -> None:
    """Integers are equal, angles of up to a hundred thousand within float32's rounding, in every order of warps."""
    (check,) = all_checks(torch.device("cpu"), small=True, sources={"step.cu"})
    found = judge(check, simulate(check.run))
    assert found["error"] < 2e-7


@pytest.mark.parametrize("windows", [(None, None), (None, 8)])
def test_the_batch_is_the_references(windows: tuple[int | None, ...]) -> None:
    """With one KV group and with two, whose ropes differ: the same tensors, and cosines and sines that are memos."""
    specs = [AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=64 * (1 + (window is not None)), scale=1.0, kv_layer=i,
                           window=window) for i, window in enumerate(windows)]  # fmt: skip
    layout = plan_kv(specs, block_size=4, dtype=torch.bfloat16)
    ropes = [Rope(torch.rand(spec.head_dim // 2), 1.5) for spec in specs[:1] + specs[-1:]]
    tables = [torch.randint(0, 99, (6, 40), dtype=torch.int32) for _ in layout.groups]
    inputs = torch.tensor([[3, 5, 0], [7, 0, 9], [13, 0, 31]])
    expected = ops_torch.prepare_decodes(inputs, tables, 5, layout, ropes, 33)
    with using(SimulatedLauncher()):
        batch = ops_cuda.prepare_decodes(inputs, tables, 5, layout, ropes, 33)
    for name in ("token_ids", "positions", "cu_q", "context_lens", "padding"):
        found, wanted = getattr(batch, name), getattr(expected, name)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name
    for found, wanted in zip((*batch.tables, *batch.slots), (*expected.tables, *expected.slots), strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    assert (batch.max_q, batch.max_context, batch.layout) == (1, 33, layout)
    for rope in ropes:
        kept = batch.memo(rope, lambda: pytest.fail("not prepared"))
        for found, wanted in zip(kept, ops_torch.rope_angles(expected, rope), strict=True):
            assert found.shape == wanted.shape
            torch.testing.assert_close(found, wanted, rtol=0, atol=5e-7)


def test_supports_says_why_not() -> None:
    """Rows of another type are named."""
    assert step.supports(torch.zeros(2, dtype=torch.int64)) is None
    assert step.supports(torch.zeros(2)) == "dtype torch.float32"
