"""The seam between models and kernels, and one module per implementation."""
