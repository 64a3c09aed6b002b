"""The model: checkpoints, layers, attention over the paged KV cache, sampler and runner (floor 2, torch, synchronous)."""
