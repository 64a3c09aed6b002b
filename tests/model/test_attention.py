"""Paged attention and the KV write against the textbook, one token at a time in float64."""

from __future__ import annotations

import random

import attrs
import pytest
import torch
from torch import Tensor

from tests.model.paged import CPU, make_batch, poison
from trio_llm.model.ops import seam as ops
from trio_llm.model.paged.kv_cache import AttentionSpec, KVCache, plan_kv
from trio_llm.model.paged.rope import Rope

SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=8, scale=0.3, kv_layer=0)
NO_ROPE = Rope(torch.zeros(4))
BLOCK_SIZE = 4


def textbook(q: Tensor, k: Tensor, v: Tensor, position: int, spec: AttentionSpec) -> Tensor:
    """Attend one query [Hq, D] at `position` to keys and values [T, Hkv, D]."""
    first = 0 if spec.window is None else max(0, position - spec.window + 1)
    out = []
    for head in range(spec.num_heads):
        kv_head = head // (spec.num_heads // spec.num_kv_heads)
        scores = k[first : position + 1, kv_head].double() @ q[head].double() * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        out.append(scores.softmax(0) @ v[first : position + 1, kv_head].double())
    return torch.stack(out)


def run(
    spec: AttentionSpec, histories: list[int], counts: list[int], *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    """Write `histories` tokens of each row, then a step of `counts` more; return its and the textbook's answers."""
    layout = plan_kv([spec], block_size=BLOCK_SIZE, dtype=dtype)
    kv = KVCache(layout, 2048, CPU)
    poison(kv.layers[0], slice(None))
    totals = [h + c for h, c in zip(histories, counts, strict=True)]
    qkvs = [torch.randn(total, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim) for total in totals]
    blocks = list(range(1, 2048))
    random.Random(0).shuffle(blocks)
    longest = max(-(-total // BLOCK_SIZE) for total in totals)
    table = torch.tensor([[blocks.pop() for _ in range(longest)] for _ in totals], dtype=torch.int32)

    def step(starts: list[int], amounts: list[int]) -> Tensor:
        rows = [i for i, amount in enumerate(amounts) if amount]
        batch = make_batch(
            [0] * sum(amounts), [starts[i] for i in rows], [amounts[i] for i in rows], [table[rows]], layout
        )
        qkv = torch.cat([qkvs[i][starts[i] : starts[i] + amounts[i]] for i in rows])
        q = ops.write_kv(qkv, batch, kv.layers[0], spec, NO_ROPE)
        return ops.paged_attention(q, batch, kv.layers[0], spec)

    if any(histories):
        step([0] * len(totals), histories)
    answers = step(histories, counts).view(-1, spec.num_heads, spec.head_dim)
    expected = []
    for qkv, history, total in zip(qkvs, histories, totals, strict=True):
        heads = qkv.view(total, -1, spec.head_dim)
        q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        expected += [textbook(q[i], k, v, i, spec) for i in range(history, total)]
    return answers, expected


CASES = {
    "decodes of many lengths": ([0, 1, 3, 4, 63, 64, 65, 200, 17], [1] * 9),
    "decodes in their own order": ([7] * 5, [1] * 5),
    "one prefill": ([0], [40]),
    "chunks beside decodes": ([0, 5, 30, 16, 100, 2], [20, 1, 16, 1, 9, 3]),
    "rows of two to eight tokens": ([10, 11, 64, 0, 9], [2, 2, 8, 5, 5]),
    "queries in several blocks": ([3, 600], [1100, 530]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 1, 6, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_ragged_batches_equal_the_textbook(case: str, window: int | None, softcap: float | None) -> None:
    """Every mix of row lengths, with and without window and softcap, attends to exactly what it should."""
    torch.manual_seed(0)
    answers, expected = run(attrs.evolve(SPEC, window=window, softcap=softcap), *CASES[case])
    assert (answers - torch.stack(expected)).abs().max() < 2e-5


def test_int8_is_read_back_with_its_scales() -> None:
    """With INT8 storage the answers differ by no more than the quantisation of keys and values allows."""
    torch.manual_seed(0)
    answers, expected = run(SPEC, *CASES["chunks beside decodes"], dtype=torch.int8)
    assert 0 < (answers - torch.stack(expected)).abs().max() < 0.03


def test_int8_rounds_to_half_a_unit() -> None:
    """Each stored value is within half a unit of its head's largest magnitude over 127, and a zero head stays zero."""
    layout = plan_kv([SPEC], block_size=BLOCK_SIZE, dtype=torch.int8)
    kv = KVCache(layout, 4, CPU)
    qkv = torch.randn(3, 10 * 8) * torch.tensor([[1e-6], [1.0], [1e4]])
    qkv[0].zero_()
    batch = make_batch([0] * 3, [0], [3], [torch.tensor([[2]], dtype=torch.int32)], layout)
    ops.write_kv(qkv, batch, kv.layers[0], SPEC, NO_ROPE)
    layer = kv.layers[0]
    assert layer.k_scale is not None
    stored = layer.k[8:11] * layer.k_scale[8:11, :, None]
    original = qkv.view(3, 10, 8)[:, 6:8]
    assert torch.all((stored - original).abs() <= 0.5001 * original.abs().amax(-1, keepdim=True) / 127)
    assert torch.all(layer.k[9:11].abs().amax(-1) == 127)


def test_the_same_token_is_stored_alike_in_any_step() -> None:
    """Quantising a token alone or among others writes the very same bytes."""
    layout = plan_kv([SPEC], block_size=BLOCK_SIZE, dtype=torch.int8)
    qkv = torch.randn(7, 10 * 8)
    kvs = [KVCache(layout, 4, CPU) for _ in range(2)]
    table = torch.tensor([[1, 3]], dtype=torch.int32)
    ops.write_kv(qkv, make_batch([0] * 7, [0], [7], [table], layout), kvs[0].layers[0], SPEC, NO_ROPE)
    for i in range(7):
        batch = make_batch([0], [i], [1], [table], layout)
        ops.write_kv(qkv[i : i + 1], batch, kvs[1].layers[0], SPEC, NO_ROPE)
    slots = torch.tensor([4, 5, 6, 7, 12, 13, 14])
    assert torch.equal(kvs[0].layers[0].k[slots], kvs[1].layers[0].k[slots])
    assert torch.equal(kvs[0].layers[0].v[slots], kvs[1].layers[0].v[slots])


def test_a_batch_knows_its_positions_and_slots() -> None:
    """Positions, row borders, context lengths and slots follow from starts, counts and tables."""
    layout = plan_kv([SPEC], block_size=BLOCK_SIZE, dtype=torch.float32)
    table = torch.tensor([[5, 9], [2, 7], [3, 0]], dtype=torch.int32)
    batch = make_batch([10, 11, 12, 13, 14, 15], [3, 7, 0], [2, 1, 3], [table], layout)
    assert batch.positions.tolist() == [3, 4, 7, 0, 1, 2]
    assert batch.cu_q.tolist() == [0, 2, 3, 6]
    assert batch.context_lens.tolist() == [5, 8, 3]
    assert batch.slots[0].tolist() == [5 * 4 + 3, 9 * 4, 7 * 4 + 3, 3 * 4, 3 * 4 + 1, 3 * 4 + 2]
    assert (batch.max_q, batch.max_context) == (3, 8)


def test_a_sliding_layer_reads_only_its_window() -> None:
    """Slots before the window may hold NaN and table entries before it may point anywhere."""
    spec = attrs.evolve(SPEC, window=6)
    layout = plan_kv([spec], block_size=BLOCK_SIZE, dtype=torch.float32)
    kv = KVCache(layout, 8, CPU)
    poison(kv.layers[0], slice(None))
    table = torch.tensor([[0, 0, 0, 4, 5]], dtype=torch.int32)  # 17 tokens, of which 12 to 17 are visible
    for start, count in ((12, 5), (17, 1)):
        qkv = torch.randn(count, 10 * 8)
        batch = make_batch([0] * count, [start], [count], [table], layout)
        q = ops.write_kv(qkv, batch, kv.layers[0], spec, NO_ROPE)
        answers = ops.paged_attention(q, batch, kv.layers[0], spec)
    assert torch.isfinite(answers).all()
