"""Steps of which torch attends for long prefills, and the kernel for the rows beside them."""

from __future__ import annotations

from tests.kernels.helpers import assert_close, simulate
from tests.model_runner.rows_in_torch import layer_of, long_from
from tools.kernel_lab.attention import Case, make
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops.long_prefills import parts_of

MIXED = Case(head_dim=64, group=3, sequences=((40, 77), (1, 33), (21, 21), (33, 50), (1, 9), (5, 18)))


def test_other_rows_are_the_kernels() -> None:
    """Beside torch's, the kernel attends for the rows in between: launched for those alone, right in float64."""
    problem = make(MIXED)
    batch, kv, spec = layer_of(problem)
    with long_from(20):
        parts = parts_of(problem.q, batch, kv, spec)
        (out,) = simulate(lambda: (ops_cuda.paged_attention(problem.q, batch, kv, spec).view_as(problem.q),))
    assert [(part.is_long, part.tokens, part.max_q, part.max_context) for part in parts] == [
        (True, slice(0, 40), 40, 77), (False, slice(40, 41), 1, 33), (True, slice(41, 62), 21, 21),
        (True, slice(62, 95), 33, 50), (False, slice(95, 101), 5, 18),
    ]  # fmt: skip
    assert_close(out, problem.expect(), slack=4)
