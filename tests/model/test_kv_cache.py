from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.model.golden import Golden
from tests.model.paged import CPU, Paged, load
from tests.model.test_reduced_precision import errors
from trio_llm.errors import UnsupportedError
from trio_llm.model.ops import cpu as native
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.model.paged.kv_cache import AttentionSpec, KVCache, KVLayout, plan_kv


def spec(
    layer: int, heads: int, head_dim: int, window: int | None = None, kv_layer: int | None = None
) -> AttentionSpec:
    """Describe a layer of eight query heads."""
    return AttentionSpec(
        num_heads=8,
        num_kv_heads=heads,
        head_dim=head_dim,
        scale=1.0,
        window=window,
        kv_layer=layer if kv_layer is None else kv_layer,
    )


def uniform(num_layers: int, head_dim: int, *, dtype: torch.dtype = torch.bfloat16) -> KVLayout:
    """Lay out layers that are all alike."""
    return plan_kv([spec(i, 2, head_dim) for i in range(num_layers)], block_size=16, dtype=dtype)


def gemma4(
    num_layers: int, full_every: int, sliding: tuple[int, int], full: tuple[int, int], shared: int = 0
) -> KVLayout:
    """Lay out a Gemma 4 of real size; sliding and full are (KV heads, head size)."""
    is_full = [(i + 1) % full_every == 0 or i == num_layers - 1 for i in range(num_layers)]
    owners = num_layers - shared
    specs = [
        spec(i, *(full if f else sliding), None if f else 512)
        if i < owners
        else spec(i, *(full if f else sliding), None if f else 512, max(j for j in range(owners) if is_full[j] == f))
        for i, f in enumerate(is_full)
    ]
    return plan_kv(specs, block_size=16, dtype=torch.bfloat16)


def test_alike_layers_are_one_group() -> None:
    """A model of one kind of attention has one group, one block table and no padding."""
    layout = uniform(24, 64)
    assert [(group.layers, group.block_size) for group in layout.groups] == [(tuple(range(24)), 16)]
    assert layout.block_bytes == 24 * 16 * 2 * 2 * 64 * 2 == layout.used_bytes(0)


@pytest.mark.parametrize(
    ("layout", "num_groups", "block_sizes", "num_tensors"),
    [
        (gemma4(35, 5, (1, 256), (1, 512), shared=20), 5, {32, 16}, 3),  # E2B
        (gemma4(42, 6, (2, 256), (2, 512), shared=18), 6, {32, 16}, 4),  # E4B
        (gemma4(30, 6, (8, 256), (2, 512)), 6, {16, 32}, 5),  # 26B-A4B
        (gemma4(60, 6, (16, 256), (4, 512)), 6, {16, 32}, 10),  # 31B
    ],
)
def test_gemma4_blocks_are_equal_without_padding(
    layout: KVLayout, num_groups: int, block_sizes: set[int], num_tensors: int
) -> None:
    """In every published Gemma 4, blocks of both head sizes have the same bytes and nothing is wasted."""
    assert len(layout.groups) == num_groups
    assert {group.block_size for group in layout.groups} == block_sizes
    assert layout.num_tensors == num_tensors
    assert {layout.used_bytes(group) for group in range(num_groups)} == {layout.block_bytes}


def test_sharing_layers_hold_nothing() -> None:
    """Layers that share KV are in no group and read the tensors of the layer they share."""
    layout = gemma4(35, 5, (1, 256), (1, 512), shared=20)
    assert sorted(layer for group in layout.groups for layer in group.layers) == list(range(15))
    kv = KVCache(layout, 4, CPU)
    assert kv.layers[34] is kv.layers[14]
    assert kv.layers[33] is kv.layers[13]


def test_padding_is_what_is_stated() -> None:
    """Where layer counts do not divide, the groups' unused bytes are known, and the smaller padding is chosen."""
    specs = [spec(i, 2, 64, None if i in (3, 7, 10) else 8) for i in range(11)]  # 8 sliding, 3 full
    layout = plan_kv(specs, block_size=16, dtype=torch.bfloat16)
    assert sorted(len(group.layers) for group in layout.groups) == [2, 3, 3, 3]
    assert sorted(layout.used_bytes(g) / layout.block_bytes for g in range(4)) == [2 / 3, 1, 1, 1]
    nearly = [spec(i, 2, 64, None if i % 2 else 8) for i in range(21)]  # 11 sliding, 10 full
    assert [len(g.layers) for g in plan_kv(nearly, block_size=16, dtype=torch.bfloat16).groups] == [11, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_slots_of_different_blocks_never_overlap(dtype: torch.dtype) -> None:
    """Groups share memory block by block: writing a block through one group touches no other block of another."""
    specs = [spec(0, 3, 16), spec(1, 2, 8, 4), spec(2, 2, 8, 4), spec(3, 3, 16)]  # sizes that do not divide
    kv = KVCache(plan_kv(specs, block_size=4, dtype=dtype), 8, CPU)
    block_sizes = [group.block_size for group in plan_kv(specs, block_size=4, dtype=dtype).groups]
    for writer in range(4):
        for parts in zip(*(parts_of(layer) for layer in (kv.layers[writer], kv.layers[3 - writer])), strict=True):
            sizes = [block_sizes[kv.layers[i].group] for i in (writer, 3 - writer)]
            parts[1].fill_(1)
            parts[0][3 * sizes[0] : 4 * sizes[0]] = 2
            changed = (parts[1] == 2).flatten(1).any(1).nonzero().flatten()
            assert set((changed // sizes[1]).tolist()) <= {3}


def parts_of(layer: object) -> list[torch.Tensor]:
    """Return a layer's tensors that are there."""
    return [p for name in ("k", "v", "k_scale", "v_scale") if (p := getattr(layer, name)) is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_what_is_promised_is_allocated(dtype: torch.dtype) -> None:
    """The pool takes block_bytes for every block, no more."""
    specs = [spec(0, 3, 16), spec(1, 2, 8, 4), spec(2, 2, 8, 4), spec(3, 3, 16)]
    layout = plan_kv(specs, block_size=4, dtype=dtype)
    assert KVCache(layout, 10, CPU).nbytes == 10 * layout.block_bytes
    assert all(group.block_size % 4 == 0 for group in layout.groups)


def test_fp8_on_native_kernels_falls_back_and_is_counted(golden: Callable[[str], Golden]) -> None:
    """No native kernel reads or writes FP8: the reference does, gives what it gives alone, and the reason is told."""
    case = golden("qwen3")
    with dispatching(Dispatch("auto", native, "cpu")) as counting:
        got = Paged(load(case.directory, kv_cache_dtype="fp8_e4m3"), 1).step([(0, case.prompts[1])])[0]
    alone = Paged(load(case.directory, kv_cache_dtype="fp8"), 1).step([(0, case.prompts[1])])[0]
    assert errors(alone, got)[0] < 0.02
    fallen = {(op, reason): count for (op, how, reason), count in counting.calls.items() if how == "reference"}
    layers = len(load(case.directory).model.specs)
    reason = "keys and values of FP8"
    assert fallen == {("write_kv", reason): layers, ("paged_attention", reason): layers}
    strict = Dispatch("native", native, "cpu")
    with (
        dispatching(strict),
        pytest.raises(UnsupportedError, match="no kernel does write_kv with keys and values of FP8"),
    ):
        Paged(load(case.directory, kv_cache_dtype="fp8"), 1).step([(0, case.prompts[1])])


def test_fp8_takes_the_memory_of_int8() -> None:
    """A byte and a scale per token and head."""
    int8, fp8 = (uniform(1, 64, dtype=dtype) for dtype in (torch.int8, torch.float8_e4m3fn))
    assert fp8.block_bytes == int8.block_bytes == 2 * 16 * 2 * (64 + 4)
