"""One step's ragged batch as the layers see it.

Built once a step by the runner; every layer reads it. Knows rows, positions, block tables and slots;
nothing of requests or sampling.

Letters: B rows (sequences), S tokens of this step over all rows, M blocks per table, T tokens per block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trio_llm.model.kv_cache import KVLayout


class AttentionBatch:
    """The rows of one step and where their keys and values live.

    Attributes:
        token_ids: [S] int64.
        positions: [S] int64, position of each token in its sequence.
        cu_q: [B + 1] int32, where each row's tokens begin in S.
        context_lens: [B] int32, tokens a row may see: start + count.
        tables: Per KV group [B, M] int32; entries before a window and past the end are never read.
        slots: Per KV group [S] int64, where each token's key and value are written.
        starts, counts: The same on the host, one int per row.
    """

    def __init__(
        self,
        token_ids: Sequence[int] | Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        tables: Sequence[Tensor],
        layout: KVLayout,
        device: torch.device,
    ) -> None:
        """Compute positions and slots.

        Args:
            token_ids: S tokens, row after row.
            starts: Per row, position of its first token; all before it are in the cache.
            counts: Per row, tokens computed in this step, at least 1.
            tables: Per KV group [B, M] int32 on any device; M covers at least the row's start + count tokens.
        """
        raise NotImplementedError

    def last_tokens(self) -> Tensor:
        """Return [B] int64, the index in S of each row's last token (whose hidden state is sampled from)."""
        raise NotImplementedError
