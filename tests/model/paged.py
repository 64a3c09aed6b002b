"""Drives a loaded model through the paged path as the engine will, with everything unused poisoned.

Blocks are handed out in random order; a block that leaves a window is filled with NaN and its table entry replaced
by the null block, so that a read outside the window or of an unwritten slot shows in the result.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trio_llm.config import EngineConfig
from trio_llm.model.loading.loader import LoadedModel, inspect_model, load_model
from trio_llm.model.paged.attention_batch import AttentionBatch, lay_out
from trio_llm.model.paged.kv_cache import KVCache, KVLayout, LayerKV

CPU = torch.device("cpu")
NUM_BLOCKS = 512


def load(directory: Path, *, block_size: int = 4, **settings: Any) -> LoadedModel:
    """Load a checkpoint on the CPU, in its own dtype unless `settings` (of EngineConfig) say otherwise."""
    return load_model(inspect_model(EngineConfig(model=str(directory), block_size=block_size, **settings)), CPU)


def make_batch(
    token_ids: Sequence[int], starts: Sequence[int], counts: Sequence[int], tables: Sequence[Tensor], layout: KVLayout
) -> AttentionBatch:
    """Put a ragged batch together from lists."""
    columns = lay_out(np.array(starts, np.int64), np.array(counts, np.int64))
    tensors = [torch.tensor(token_ids, dtype=torch.int64), *map(torch.from_numpy, columns)]
    return AttentionBatch.of(tensors, starts, counts, tables, layout)


class Paged:
    """Sequences in a pool. `lengths` are the tokens computed so far."""

    def __init__(self, loaded: LoadedModel, num_sequences: int, *, seed: int = 0) -> None:
        self.model, self.layout = loaded.model, loaded.kv_layout
        self.kv = KVCache(self.layout, NUM_BLOCKS, CPU)
        for layer in self.kv.layers:
            poison(layer, slice(None))
        self.free = list(range(1, NUM_BLOCKS))
        random.Random(seed).shuffle(self.free)
        self.lengths = [0] * num_sequences
        self.tables: list[list[list[int]]] = [[[] for _ in self.layout.groups] for _ in range(num_sequences)]

    def step(self, rows: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """Run one ragged batch of (sequence, its next tokens); return each row's logits [tokens, V]."""
        starts = [self.lengths[sequence] for sequence, _ in rows]
        counts = [len(tokens) for _, tokens in rows]
        for sequence, tokens in rows:
            self._extend(sequence, len(tokens))
        tables = [self._table([sequence for sequence, _ in rows], group) for group in range(len(self.layout.groups))]
        flat = [token for _, tokens in rows for token in tokens]
        batch = make_batch(flat, starts, counts, tables, self.layout)
        with torch.inference_mode():
            logits = self.model.logits(self.model.forward(batch, self.kv))
        for sequence, _ in rows:
            self._leave_window(sequence)
        return list(logits.split(counts))

    def _extend(self, sequence: int, count: int) -> None:
        self.lengths[sequence] += count
        for table, group in zip(self.tables[sequence], self.layout.groups, strict=True):
            while len(table) * group.block_size < self.lengths[sequence]:
                table.append(self.free.pop())

    def _table(self, sequences: Sequence[int], group: int) -> Tensor:
        tables = [self.tables[sequence][group] for sequence in sequences]
        longest = max(map(len, tables))
        return torch.tensor([[*table, *[0] * (longest - len(table))] for table in tables], dtype=torch.int32)

    def _leave_window(self, sequence: int) -> None:
        for index, (table, group) in enumerate(zip(self.tables[sequence], self.layout.groups, strict=True)):
            unseen = max(0, self.lengths[sequence] - group.window + 1) if group.window else 0
            for i in range(unseen // group.block_size):
                if table[i]:
                    slots = slice(table[i] * group.block_size, (table[i] + 1) * group.block_size)
                    for layer in self.kv.layers:
                        if layer.group == index:
                            poison(layer, slots)
                    self.free.insert(0, table[i])
                    table[i] = 0

    def prefill(self, prompts: Sequence[Sequence[int]], chunk: int | None) -> list[Tensor]:
        """Compute whole prompts in ragged steps of at most `chunk` tokens a row; return their logits."""
        logits: list[list[Tensor]] = [[] for _ in prompts]
        while rows := [
            (i, prompt[self.lengths[i] :][:chunk]) for i, prompt in enumerate(prompts) if self.lengths[i] < len(prompt)
        ]:
            for (i, _), part in zip(rows, self.step(rows), strict=True):
                logits[i].append(part)
        return [torch.cat(parts) for parts in logits]

    def greedy(self, prompts: Sequence[Sequence[int]], chunk: int | None, num_tokens: int) -> list[list[int]]:
        """Generate from every prompt, all sequences in one batch."""
        outputs = [[int(part[-1].argmax())] for part in self.prefill(prompts, chunk)]
        for _ in range(num_tokens - 1):
            rows = [(i, output[-1:]) for i, output in enumerate(outputs)]
            for output, part in zip(outputs, self.step(rows), strict=True):
                output.append(int(part[-1].argmax()))
        return outputs


def poison(layer: LayerKV, slots: slice) -> None:
    """Make slots unusable: NaN, or for int8 the scales NaN."""
    for values, scales in ((layer.k, layer.k_scale), (layer.v, layer.v_scale)):
        if scales is None:
            values[slots] = torch.nan
        else:
            scales[slots] = torch.nan
