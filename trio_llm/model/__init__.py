"""The model: checkpoints, layers, attention over the paged KV cache, sampler, runner (floor 2: torch)."""
