"""Tensor parallelism: the ranks that share every layer, what each holds of a tensor, and their collectives."""
