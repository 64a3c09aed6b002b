"""`trio-llm` and `python -m trio_llm`: run a command; an error of the user's is one line and an exit code."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line; exit 2 for a wrong setting or argument, 130 after Ctrl-C, 1 for all else that fails."""
    # Half a million objects are made at start and stay alive. Python's default of 700 collects them hundreds of times.
    gc.set_threshold(50_000, 20, 100)
    try:
        _run()
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells report it; here it came while the commands were being imported


def _run() -> None:
    from trio_llm.cli.commands import cli
    from trio_llm.errors import ConfigError, InvalidRequestError, TrioLLMError

    try:
        cli(prog_name="trio-llm")
    except TrioLLMError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)  # noqa: T201 - the console is the interface
        sys.exit(2 if isinstance(error, ConfigError | InvalidRequestError) else 1)


if __name__ == "__main__":
    main()
