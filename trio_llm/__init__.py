"""trio-llm: an LLM inference engine and OpenAI-compatible server you can read."""

__version__ = "0.1.0"
