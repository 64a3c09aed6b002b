"""Check and measure the CUDA kernels: `python -m tools.kernel_lab check|bench`, on a GPU or, with --sim, without one.

Built to be run once on a machine that is lent for minutes: every phase has a deadline, and what is known is written
to disk after each.
"""
