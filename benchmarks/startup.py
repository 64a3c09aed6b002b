"""From the start of `trio-llm serve` to the first token of a request: `trio-llm bench startup`, run from a checkout."""

import sys

from trio_llm.cli.commands import cli

if __name__ == "__main__":
    cli(["bench", "startup", *sys.argv[1:]], prog_name="trio-llm")
