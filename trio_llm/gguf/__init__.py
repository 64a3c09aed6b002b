"""GGUF files, as Hugging Face would have spelled what they hold: configuration and tokenizer (no torch)."""
