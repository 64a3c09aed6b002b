"""Floor 4: OpenAI's HTTP interface over an engine, on quart-trio and hypercorn's protocol pieces (no torch)."""
