"""Checkpoints on disk: finding them, reading config.json and safetensors, named tensors for a model."""
