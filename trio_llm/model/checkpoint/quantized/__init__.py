"""Quantised safetensors checkpoints: which tensors make one matrix, and how they are widened. One module per format."""
