"""Chat templates: from a conversation to the text that a model reads."""
