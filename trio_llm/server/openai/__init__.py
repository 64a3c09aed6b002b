"""OpenAI's endpoints except files and batches: completions, chat, responses, embeddings, models, tokenization."""
