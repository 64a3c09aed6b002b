"""Floor 1: which tokens a step computes and where their KV lives; pure state machines (no trio, torch, clock, dice)."""
