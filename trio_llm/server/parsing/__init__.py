"""What a chat model writes beside its answer, told apart while it streams: reasoning and tool calls. Pure."""
