"""`trio-llm plan`: its tables, its JSON, and its command lines, which `serve` takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from trio_llm.cli.commands import cli
from trio_llm.errors import ConfigError


def plan(*arguments: str) -> str:
    """Return what the command prints."""
    result = CliRunner().invoke(cli, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands_of_a_plan_are_taken_by_serve() -> None:
    """Each choice ends with a command; `serve` reads from it what the plan was made with."""
    found = json.loads(plan("--users", "3", "--context", "100", "--spec-method", "ngram", "--json"))
    assert (found["users"], found["context"], found["rate"]) == (3, 100, None)
    assert [choice["choice"] for choice in found["choices"]] == [
        "as asked", "keys and values of 8 bits", "weights of 8 bits", "weights, keys and values of 8 bits",
    ]  # fmt: skip
    for choice in found["choices"]:
        program, *arguments = choice["command"]
        result = CliRunner().invoke(cli, [*arguments, "--print-config"])
        assert (program, result.exit_code) == ("trio-llm", 0)
        values = dict(line.split()[:2] for line in result.output.splitlines())
        assert values["engine.max_model_len"] == "100"
        assert values["engine.max_batch_size"] == "3"
        assert values["engine.num_kv_blocks"] == str(choice["num_kv_blocks"]) == "22"
        assert values["engine.spec_method"] == "ngram"
        assert (values["engine.quantization"] == "int8") == ("weights" in choice["choice"])
        assert (values["engine.kv_quantization"] == "true") == ("keys" in choice["choice"])


def test_the_tables_tell_what_is_needed() -> None:
    """The table of memory comes first, then the choices; a bandwidth adds the tokens a second that it allows."""
    quiet = plan("--users", "3", "--context", "100", "--rate", "20")
    assert quiet.startswith("weights")
    assert "3 users with 100 tokens each: 1 device, 3 users and 22 blocks on each; threads:" in quiet
    assert "GB/s for 20 tokens a second each" in quiet
    assert "TOKENS/S" not in quiet
    assert "trio-llm serve --max-model-len 100 --max-batch-size 3 --kv-blocks 22\n" in quiet
    loud = plan("--users", "3", "--context", "100", "--bandwidth", "10")
    assert "TOKENS/S AT MOST" in loud


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--context", "100"), "Missing option '--users'"),
        (("--users", "0", "--context", "100"), "Invalid value for '--users'"),
        (("--users", "1", "--context", "0"), "Invalid value for '--context'"),
        (("--users", "1", "--context", "9", "--rate", "0"), "Invalid value for '--rate'"),
        (("--users", "1", "--context", "9", "--max-batch-size", "4"), "No such option"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], says: str) -> None:
    """What is missing, out of range, or decided by the plan itself."""
    result: Any = CliRunner().invoke(cli, ["plan", *arguments])
    assert result.exit_code == 2
    assert says in result.output


def test_a_context_beyond_the_model_is_refused() -> None:
    """The error is the one line that the console prints."""
    with pytest.raises(ConfigError, match="context = 100000: at most 2048, what the model was made for"):
        plan("--users", "1", "--context", "100000")
