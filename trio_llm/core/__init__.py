"""Floor 1: scheduling and KV blocks as pure state machines, without Trio, torch, clocks or random numbers."""
