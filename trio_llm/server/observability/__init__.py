"""Traces, the statistics log line and HTTP metrics."""
