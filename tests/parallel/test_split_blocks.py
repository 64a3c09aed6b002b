"""Weights of 4 and 8 bits among ranks: cut between their groups, and computed as they are stored."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import gguf
import pytest
import torch

from tests.gguf.files import random_blocks
from tests.model.as_stored import ROUNDED_TOLERANCE
from tests.model.paged import Paged
from tests.model.test_quantized_as_stored import CASES, load_as_stored, make
from tests.parallel.ranks import in_ranks, load_part
from trio_llm.model.checkpoint.cut_blocks import can_be_cut, cut
from trio_llm.model.checkpoint.gguf import CONVERTERS
from trio_llm.model.ops import cpu as native
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.model.ops.matrices import Blocks, Dense, Panels
from trio_llm.model.ops.torch_reference import dequantize
from trio_llm.model.parallel.group import Group
from trio_llm.model.parallel.span import Span

SIZE = 2
# Reference: sums in another order. Kernels: a last bit then rounds some activations to the next of 8-bit numbers.
TOLERANCES = {"reference": 1e-4, "native": ROUNDED_TOLERANCE}
CHOSEN = [
    "awq", "awq-experts", "gptq", "gptq-8-act-order-biases", "gptq-v2-act-order", "gptq-experts", "w4a16-asymmetric",
    "w4a16-experts", "w8a8", "w8a16-groups",
]  # fmt: skip


def computing_on(kernels: str) -> AbstractContextManager[object]:
    """Dispatch this thread's operations."""
    return nullcontext() if kernels == "reference" else dispatching(Dispatch("native", native, "cpu"))


@pytest.mark.parametrize("kernels", TOLERANCES)
@pytest.mark.parametrize("case", CHOSEN)
def test_ranks_compute_what_one_process_does(case: str, kernels: str, tmp_path: Path) -> None:
    """Each rank keeps its part of every matrix but those whose inputs have an order of their own, and widens these."""
    packer, config, name, family = (getattr(CASES[case], field) for field in ("packer", "config", "name", "family"))
    widths = {"intermediate_size": 128} | ({"moe_intermediate_size": 64} if family == "qwen3-moe" else {})
    made, _ = make(tmp_path, family, packer, config, **widths)
    directory = tmp_path / "model"
    with computing_on(kernels):
        whole = load_as_stored(directory)
        expected = torch.cat(Paged(whole, len(made.prompts)).prefill(made.prompts, 7))

    def work(group: Group) -> tuple[torch.Tensor, dict[str, int], object, object]:
        with computing_on(kernels):
            part = load_part(directory, group, as_stored=True, dtype="float32")
            attention = part.model.layers[0].attention  # type: ignore[attr-defined]
            logits = torch.cat(Paged(part, len(made.prompts)).prefill(made.prompts, 7))
            return logits, part.plan.kept_formats, attention.qkv, attention.out

    found = in_ranks(SIZE, tmp_path / "ranks", work)
    assert float((found[0][0] - expected).abs().max()) < TOLERANCES[kernels]
    for _, kept, qkv, out in found:
        share = kept[name] / whole.plan.kept_formats[name]
        if kernels == "native":
            assert isinstance(qkv, Panels) and not isinstance(qkv.kind, torch.dtype)
        else:
            assert isinstance(qkv, Blocks) and isinstance(out, Dense if "order" in case else Blocks)
        assert share < 0.5 if "order" in case else share == 0.5


@pytest.mark.parametrize("name", list(CONVERTERS))
def test_a_part_holds_the_same_numbers(name: str) -> None:
    """Outputs and whole groups of inputs of every format of GGUF files, widened, are those of the whole matrix."""
    kind = gguf.GGMLQuantizationType[name]
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = torch.from_numpy(random_blocks(kind, 6, 1024)).view(6, 1024 // size, num_bytes)
    matrix = Blocks.gathered(6, [CONVERTERS[name](raw)])
    rows, columns = Span(6, 2, 2, 2), Span(1024, 512, 512, 512)
    assert can_be_cut(matrix, rows, columns)
    torch.testing.assert_close(dequantize(cut(matrix, rows, columns)), dequantize(matrix)[2:4, 512:], rtol=0, atol=0)
    assert not can_be_cut(matrix, rows, Span(1024, 16, 16, 16))
    assert can_be_cut(matrix, rows, Span(1024, 256, 256, 256))
    assert can_be_cut(matrix, rows, Span(1024, 128, 128, 128)) == (matrix.outer is None)


def test_what_some_ranks_would_pad_is_widened_on_all() -> None:
    """The first rank decides as the last one does, whose part is shorter."""
    matrix = Blocks(torch.zeros(6, 64, dtype=torch.int8), torch.ones(6, 2))
    assert can_be_cut(matrix, Span(6, 0, 3, 3), Span.whole(64))
    assert not can_be_cut(matrix, Span(6, 0, 4, 4), Span.whole(64))
    assert can_be_cut(matrix, Span.whole(6), Span(64, 0, 32, 32))
    shared = Blocks(matrix.weight, torch.ones(6, 1))
    assert can_be_cut(shared, Span.whole(6), Span(64, 0, 32, 32))
    assert len(cut(shared, Span.whole(6), Span(64, 32, 32, 32)).scale[0]) == 1
    assert not can_be_cut(matrix, Span.whole(6), Span(64, 0, 48, 48))
