"""One module per model family, and the layers they share."""
