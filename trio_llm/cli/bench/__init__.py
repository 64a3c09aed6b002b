"""`trio-llm bench`: how fast, measured with repetitions, shown as medians with their ranges."""
