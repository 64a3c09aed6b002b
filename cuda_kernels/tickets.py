"""Counters by which the last block of a split piece of work finds that all others are done."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MAX_TICKETS = 4096  # pieces that are split: there are fewer than blocks that fill a device


def take_tickets(device: torch.device, count: int) -> Tensor:
    """Return counters that are 0 between launches, the same for all launches of a stream, which run one by one."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    tickets = make_tickets(device, stream)
    assert count <= len(tickets), "only a few blocks are worth splitting"
    return tickets


@functools.cache
def make_tickets(device: torch.device, _stream: int) -> Tensor:
    """Return the counters of a stream."""
    # Not in inference mode: its tensors can only be written to there.
    with torch.inference_mode(mode=False):
        return torch.zeros(MAX_TICKETS, dtype=torch.int32, device=device)
