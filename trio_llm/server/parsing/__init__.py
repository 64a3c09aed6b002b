"""Splits reasoning and tool calls from the answer of a chat model while it streams. Pure."""
