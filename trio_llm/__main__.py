"""`trio-llm` and `python -m trio_llm`: run a command; an error of the user's is one line and an exit code."""

from __future__ import annotations

import sys

from trio_llm.errors import ConfigError, TrioLLMError


def main() -> None:
    """Run the command line; exit 2 for a wrong setting, 1 for anything else that cannot be done."""
    from trio_llm.cli.commands import cli

    try:
        cli(prog_name="trio-llm")
    except TrioLLMError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)  # noqa: T201 - the console is the interface
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
