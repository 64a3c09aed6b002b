"""The command line (floor 5). Nothing is imported here, so that `trio-llm --help` stays instant."""
