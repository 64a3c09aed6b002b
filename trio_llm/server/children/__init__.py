"""Processes of their own for work that may never end, or end its process: each job is bounded by the kernel."""
