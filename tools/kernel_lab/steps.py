"""Whole decode steps of real shapes, replayed from graphs as the engine replays them: random weights, no server.

Each is set against its byte floor: every weight and the context's keys and values, read once.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tools.kernel_lab.benches import GRAPH_BOUND, Target
from tools.kernel_lab.device import REPLAYS, Call, Device, noting
from tools.kernel_lab.measure import against
from tools.kernel_lab.shapes import MODELS, SMALL, Shape
from trio_llm.model.checkpoint.weights import RandomSource, Weights
from trio_llm.model.config import ModelConfig
from trio_llm.model.families.registry import find_family
from trio_llm.model.loading.loader import Model
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops.dispatch import Dispatch
from trio_llm.model.paged.kv_cache import KVCache, KVLayout, plan_kv
from trio_llm.model.parallel.span import Span, sizes
from trio_llm.model.step.decode_graphs import DecodeGraphs
from trio_llm.model.step.input_rows import BlockTables

TARGETS = {1: Target("of floor", 0.35, 0.5), 32: Target("of floor", 0.65, 0.8)}
BLOCK = 16


class OnDevice(RandomSource):
    """Random weights, made where they stay: 16 GB of them come in a second and not in minutes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(seed=0)
        self._device = device

    def read(self, name: str, spans: Sequence[Span]) -> Tensor:
        shape = sizes(spans)
        if len(shape) < 2:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=self._device)
        return torch.randn(shape, device=self._device, dtype=torch.bfloat16) * shape[1] ** -0.5


def build(shape: Shape, device: torch.device) -> tuple[Model, int]:
    """Return a model of random weights in bfloat16, and their bytes."""
    config = ModelConfig({**shape.config, "max_position_embeddings": GRAPH_BOUND}, "a shape")
    weights = Weights(OnDevice(device), torch.bfloat16, device)
    return find_family(shape.architecture)(config, weights), weights.tally.nbytes


def items(device: Device, ceilings: Mapping[str, float]) -> list[tuple[str, Call]]:
    """Return an item per model and batch size. A model is built with its first step and freed before the next one."""
    models = SMALL if device.sim else MODELS
    held: dict[str, Any] = {}

    def one(name: str, batch: int) -> dict[str, Any]:
        if name not in held:
            held.clear()
            device.release()
            held[name] = build(models[name], device.torch_device)
        model, num_bytes = held[name]
        shape = models[name]
        # An embedding that is not the head is read a row at a time.
        read = num_bytes - (0 if shape.tied else 2 * shape.vocab * shape.hidden)
        try:
            return _measure(device, model, read, batch, 20 if device.sim else 2048, ceilings)
        finally:
            gc.collect()  # a graph and its pool refer to each other
            device.release()

    batches = (1, 2) if device.sim else (1, 32, 256)
    return [(f"step of {name}, B={batch}", partial(one, name, batch)) for name in models for batch in batches]


@torch.inference_mode()
def _measure(
    device: Device, model: Model, num_bytes: int, batch: int, context: int, ceilings: Mapping[str, float]
) -> dict[str, Any]:
    layout = plan_kv(model.specs, block_size=BLOCK, dtype=torch.bfloat16)
    decode, launches = capture_decode(device, model, layout, batch, context)
    replays = 1 if device.sim else REPLAYS
    us = statistics.median([device.time_us(decode) for _ in range(replays)])
    floor_us = (num_bytes + batch * context * layout.block_bytes / BLOCK) / ceilings.get("read_gb_s", torch.nan) / 1e3
    found = {"us": us, "floor_us": floor_us, "of_floor": floor_us / us, "tokens_s": batch / us * 1e6}
    if target := TARGETS.get(batch):
        found |= against(target, found, {})
    return {**found, "launches": launches}


def capture_decode(
    device: Device, model: Model, layout: KVLayout, batch: int, context: int
) -> tuple[Callable[[], None], int]:
    """Capture a decode of `batch` rows with a context each; return its replay and the kernels of ours in it."""
    blocks = -(-context // BLOCK)
    where = device.torch_device
    bound = context if device.sim else GRAPH_BOUND
    tables = BlockTables(batch, layout, bound, where)
    places = torch.cat([torch.arange(blocks, device=where) + row * -(-bound // BLOCK) for row in range(batch)])
    numbers = 1 + torch.arange(batch * blocks, device=where, dtype=torch.int32)
    tables.write([places, numbers])
    kv = KVCache(layout, 1 + batch * blocks, where)
    for layer in kv.layers:
        layer.k.zero_()
        layer.v.zero_()
    dispatch, launches = Dispatch("cuda", ops_cuda, where.type), 0

    def capture(work: Call) -> Callable[[], None]:
        nonlocal launches
        with noting() as noted:
            replay = device.capture([work]).replay
        launches = sum(noted.kernels.values()) // (1 if device.sim else 2)  # a GPU runs it once before it captures
        return replay

    logits = torch.empty((batch, model.vocab_size), device=where)
    graphs = DecodeGraphs(model, kv, layout, tables.tables, tables.padding_row, logits, bound)
    graphs.record_when_needed(capture, dispatch)
    decodes = torch.stack([torch.arange(batch), torch.zeros(batch).long(), torch.full((batch,), context - 1)]).to(where)

    def replay() -> None:
        graphs.replay(decodes, dispatch)

    replay()
    return replay, launches
