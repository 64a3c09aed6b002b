"""From how many tokens on long prefills are torch's (`ops/long_prefills.py`): measured on this GPU, once, at start.

Both ways attend for one layer at a few lengths, torch's with its gather. What is cached before the chunk is short: the
longer it is, the less of torch's time is the gather. If torch's way fails, or its result differs, our kernel has all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType

import attrs
import numpy as np
import torch
from torch import Tensor

from trio_llm.model.device.device import Device
from trio_llm.model.ops.long_prefills import Shape, limits
from trio_llm.model.paged.attention_batch import AttentionBatch, lay_out
from trio_llm.model.paged.kv_cache import AttentionSpec, KVCache, KVLayout, plan_kv

TOKENS = (4096, 2048, 1024, 512, 256)
MARGIN = 0.9  # of our time that torch may take: else noise decides, and differently at every start (a guess)
BLOCK_SIZE, CACHED = 16, 48  # tokens; some are cached, so that a mask which begins at the first key is found out
CALLS, ROUNDS = 4, 3  # in a row, so that the host does not count; the fastest round counts
DIFFERENCE = 0.05  # of the largest value that the ways may differ by; another mask differs by more than half

_log = logging.getLogger(__name__)
# Seconds that a call takes.
Timer = Callable[[Callable[[], object]], float]


@torch.inference_mode()
def choose_prefills(
    layout: KVLayout,
    dtype: torch.dtype,
    kernels: ModuleType,
    device: Device,
    most_tokens: int,
    timer: Timer | None = None,
) -> None:
    """Set the limits of a model's shapes.

    Args:
        layout: The model's.
        dtype: Of activations; caches of another are our kernel's.
        kernels: Module of kernels whose `paged_attention` goes by the limits.
        most_tokens: The longest chunk of a prompt.
    """
    if layout.dtype != dtype:
        return
    lengths = [count for count in TOKENS if count <= most_tokens]
    plain = [attrs.evolve(spec, kv_layer=0, window=None) for spec in layout.specs if spec.softcap is None]
    for spec in {(spec.num_heads, spec.num_kv_heads, spec.head_dim): spec for spec in plain}.values():
        race = _Race(spec, dtype, kernels, device, timer or partial(seconds_of, device))
        try:
            limit = first_faster(lengths, race)
        except Exception as reason:  # noqa: BLE001 - our kernel is left, which the steps that are measured next need
            _log.info("heads of %d: torch attends for no prefills: %s", spec.head_dim, reason)
            limit = None
        else:
            from_where = "no prefills" if limit is None else f"prefills from {limit} tokens on"
            _log.info("heads of %d: torch attends for %s", spec.head_dim, from_where)
        limits.pop(race.shape, None)
        if limit is not None:
            limits[race.shape] = limit


def first_faster(lengths: Iterable[int], ways: Callable[[int], tuple[float, float]]) -> int | None:
    """Return the length from which torch is faster at every length, None for never.

    Args:
        ways: Returns the seconds of our kernel and of torch for a length. The longest are asked first, and no shorter
            one than the first at which torch is not clearly faster.
    """
    found = None
    for length in sorted(lengths, reverse=True):
        ours_s, torch_s = ways(length)
        if not torch_s <= MARGIN * ours_s:
            break
        found = length
    return found


def seconds_of(device: Device, work: Callable[[], object]) -> float:
    """Return the seconds of a call, by the device's clock."""
    work()  # which compiles and loads
    best = math.inf
    for _ in range(ROUNDS):
        began = device.mark()
        for _ in range(CALLS):
            work()
        ended = device.mark()
        ended.wait()
        best = min(best, ended.seconds_since(began) / CALLS)
    return best


@attrs.frozen(eq=False)
class _Race:
    """Times both ways of attending."""

    spec: AttentionSpec
    dtype: torch.dtype
    kernels: ModuleType
    device: Device
    timer: Timer

    @property
    def shape(self) -> Shape:
        spec = self.spec
        return Shape(self.device.torch_device, spec.num_heads, spec.num_kv_heads, spec.head_dim, self.dtype)

    def __call__(self, length: int) -> tuple[float, float]:
        """Return the seconds of our kernel and of torch for a chunk of so many tokens.

        Raises:
            NotImplementedError: No kernel takes this shape.
            ArithmeticError: Torch computes something else.
        """
        spec, where = self.spec, self.device.torch_device
        layout = plan_kv([spec], block_size=BLOCK_SIZE, dtype=self.dtype)
        kv = KVCache(layout, 1 + (CACHED + length) // BLOCK_SIZE, where).layers[0]
        kv.k.normal_()
        kv.v.normal_()
        q = torch.randn(length, spec.num_heads, spec.head_dim, dtype=self.dtype, device=where)
        outs: list[Tensor] = []
        times_s: list[float] = []
        for limit in (length + 1, length):
            limits[self.shape] = limit
            batch = self._batch(layout, length)
            reason = self.kernels.WHY_NOT["paged_attention"](q, batch, kv, spec)
            if reason not in (None, *self.kernels.LIBRARIES):
                raise NotImplementedError(reason)
            attend = partial(self.kernels.paged_attention, q, batch, kv, spec)
            outs.append(attend())
            times_s.append(self.timer(attend))
        ours, theirs = outs
        if not (theirs - ours).abs().max() <= DIFFERENCE * ours.abs().max():
            raise ArithmeticError("it differs from our kernel")
        ours_s, torch_s = times_s
        _log.info("%d tokens attend in %.3f ms by our kernel, in %.3f by torch", length, ours_s * 1e3, torch_s * 1e3)
        return ours_s, torch_s

    def _batch(self, layout: KVLayout, length: int) -> AttentionBatch:
        columns = self.device.send([np.zeros(length, np.int64), *lay_out(np.array([CACHED]), np.array([length]))])
        blocks = torch.arange(1, 1 + (CACHED + length) // BLOCK_SIZE, dtype=torch.int32, device=columns[0].device)
        return AttentionBatch.of(columns, [CACHED], [length], [blocks[None]], layout)
