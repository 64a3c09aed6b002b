"""From a checkpoint to a model in memory: the loader, the memory budget, the KV pool's size, the draft model."""
