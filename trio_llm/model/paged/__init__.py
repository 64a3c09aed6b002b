"""The paged KV cache, a step's ragged batch over it, and rotary embeddings."""
