"""`trio-llm bench`: repeated measurements, printed as medians with their ranges."""
