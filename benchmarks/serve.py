"""Throughput and latency at 1, 8 and 32 clients: `trio-llm bench serve`, run from a checkout."""

import sys

from trio_llm.cli.commands import cli

if __name__ == "__main__":
    cli(["bench", "serve", *sys.argv[1:]], prog_name="trio-llm")
