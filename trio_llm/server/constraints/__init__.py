"""Grammars that an answer must follow: response_format, tool calls, thinking budgets."""
