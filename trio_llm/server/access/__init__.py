"""Who may call what, and how often: API keys and rate limits."""
