"""From logits to tokens: parameters per row, edits, log-probabilities, random numbers, draft acceptance."""
