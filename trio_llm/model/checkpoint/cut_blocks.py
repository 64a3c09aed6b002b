"""The part of a matrix of blocks that a rank holds: outputs, or whole groups of inputs."""

from __future__ import annotations

from trio_llm.model.ops.matrices import Blocks
from trio_llm.model.parallel.span import Span

_FP8_OUTPUTS = 128  # that share the scales of groups
_RUN = 32  # inputs whose 4-bit numbers stand in each other's bytes, and whose activations are rounded together


def can_be_cut(matrix: Blocks, rows: Span, columns: Span) -> bool:
    """Return whether each rank can have its part of a matrix as it is stored: all of them can, or none."""
    if rows.size % rows.length or columns.size % columns.length:
        return False  # some have padding
    if matrix.is_fp8 and matrix.scale.shape[-1] > 1 and not rows.is_whole and rows.length % _FP8_OUTPUTS:
        return False
    if columns.is_whole:
        return True
    if columns.length % _RUN:
        return False
    if matrix.outer is not None:
        return columns.length * matrix.outer.shape[-2] % columns.size == 0
    groups = matrix.scale.shape[-1]
    return matrix.order is None and (groups == 1 or columns.length * groups % columns.size == 0)


def cut(matrix: Blocks, rows: Span, columns: Span) -> Blocks:
    """Return a rank's part; without ranks that is the matrix itself."""
    if not rows.is_whole:
        matrix = matrix.rows(slice(rows.first, rows.first + rows.count))
    return matrix if columns.is_whole else matrix.columns(columns.first, columns.first + columns.count)
