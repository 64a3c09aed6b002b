"""The page at /: a chat, and the engine at work."""
