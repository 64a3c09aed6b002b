"""One step's inputs and results: rows, last tokens, captured decodes, drafts, pooling."""
