"""The command line as its user meets it: what starts fast, what is refused, and in which words."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trio_llm import __main__
from trio_llm.cli.commands import cli
from trio_llm.cli.hints import COMMANDS, HINTS
from trio_llm.cli.settings import fields
from trio_llm.errors import EngineDeadError

HEAVY = ("torch", "transformers", "numpy", "tokenizers", "quart", "hypercorn", "trio", "rich")


def modules_loaded_by(program: str) -> set[str]:
    """Run a program in a fresh interpreter and return the heavy modules that it loaded."""
    report = f"\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program + report], capture_output=True, text=True, check=True)
    return set(eval(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy() -> None:
    """`import trio_llm` is free: torch and its friends wait until an engine is opened."""
    assert modules_loaded_by("import trio_llm") == set()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["generate", "--help"], ["bench", "--help"], ["--version"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    """`trio-llm --help` answers without torch, transformers or the server."""
    program = f"""
import sys
from trio_llm.__main__ import main
sys.argv = ["trio-llm", *{arguments}]
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    assert modules_loaded_by(program) == set()


def test_checking_the_settings_loads_no_model() -> None:
    """`check-config` and `--print-config` answer without torch."""
    program = """
import sys
from trio_llm.__main__ import main
for arguments in (["check-config"], ["serve", "--print-config"]):
    sys.argv = ["trio-llm", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code
"""
    assert modules_loaded_by(program) == set()


# What `serve` may import: its dependencies, and what these import. Each module costs every start time.
# greenlet: structlog imports it where something else has installed it; cuda: a CUDA build of torch does.
SERVE_IMPORTS = """
    attr attrs cattrs click cpu_kernels greenlet h11 hypercorn kernel_cache msgspec numpy outcome prometheus_client
    quart quart_trio regex rich safetensors sniffio sortedcontainers structlog tokenizers torch torchgen tqdm trio
    trio_llm typing_extensions yaml
    aiofiles blinker flask itsdangerous jinja2 markupsafe werkzeug
    h2 hpack hyperframe priority wsproto
    colorama idna pygments
    cuda
""".split()
SERVE_MODULES = 830  # without those of Python, torch and numpy


@pytest.mark.slow
def test_serving_the_demo_model_imports_only_what_it_needs() -> None:
    """Start-up stays short: no other package, and not torch's compiler, which takes seconds to import."""
    program = """
import sys
before = {name.partition(".")[0] for name in sys.modules}
import trio_llm.cli.commands
import trio_llm.cli.serve
import trio_llm.tokenizer
from trio_llm.config import EngineConfig
from trio_llm.model.load import load_runner
load_runner(EngineConfig()).close()
assert not {"torch._dynamo", "torch._inductor"} & set(sys.modules)
packages = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
assert not {"trio_llm.cli.bench.serve", "trio_llm.llm", "trio_llm.notebook", "trio_llm.verify"} & set(sys.modules)
known = {*sys.stdlib_module_names, "torch", "torchgen", "numpy", "cuda"}
print(sum(name.partition(".")[0] not in known for name in sys.modules))
print([name for name in packages if not name.startswith(("_", "cython"))])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, packages = done.stdout.splitlines()[-2:]
    assert set(eval(packages)) <= set(SERVE_IMPORTS)
    assert int(count) <= SERVE_MODULES


@pytest.mark.parametrize("arguments", [["check-config", "--port", "x"], ["serve", "--kv-blocks", "0"]])
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that does not parse ends in one line on stderr, no traceback, and code 2."""
    monkeypatch.setattr(sys, "argv", ["trio-llm", *arguments])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert err.startswith("error: flag --")
    assert err.count("\n") == 1


def test_any_other_refusal_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of ours that is no wrong setting is one line too, with code 1."""

    def fail(**_: object) -> None:
        raise EngineDeadError("it\nstopped")

    monkeypatch.setattr("trio_llm.cli.commands.cli", fail)
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: it stopped\n"


@pytest.mark.parametrize("flag", HINTS)
def test_vllm_flags_that_do_not_exist_are_refused_with_a_hint(flag: str) -> None:
    """A flag known from vLLM that nothing reads here is an error that says what to do instead."""
    result = CliRunner().invoke(cli, ["serve", flag])
    assert result.exit_code == 2
    assert f"No such option: {flag}. {HINTS[flag]}" in result.output


def test_hints_never_hide_a_setting() -> None:
    """No flag of ours has a hint that it does not exist."""
    spelt = {flag for _, field in fields() for flag in field.metadata["flags"]}
    assert not spelt & set(HINTS)


def test_an_unknown_flag_is_refused_with_the_closest_one() -> None:
    """A misspelt flag is an error, never ignored."""
    result = CliRunner().invoke(cli, ["serve", "--max-num-seq", "3"])
    assert result.exit_code == 2
    assert "--max-num-seqs" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nothing"],
        ["serve", "--nothing"],
        ["bench", "serve", "--nothing"],
        ["generate", "--max-tokens", "x"],
        ["serv"],
    ],
)
def test_what_cannot_be_parsed_is_one_line_and_exit_code_2(arguments: list[str]) -> None:
    """No usage stands before the error, at any depth of commands."""
    result = CliRunner().invoke(cli, arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert arguments[-1] in result.stderr


def test_the_model_can_be_a_bare_word_but_not_twice() -> None:
    """`trio-llm serve MODEL` is `vllm serve MODEL`; naming it again with a flag is refused."""
    shown = CliRunner().invoke(cli, ["serve", "some/model", "--print-config"])
    line = next(line for line in shown.output.splitlines() if line.startswith("engine.model "))
    assert line.split(maxsplit=2)[1:] == ["some/model", "argument MODEL"]
    twice = CliRunner().invoke(cli, ["serve", "some/model", "-m", "other"])
    assert twice.exit_code == 2
    assert "named twice" in twice.output


def test_a_misspelt_variable_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VLLM_ variable that nothing reads is a warning with the name that was meant."""
    monkeypatch.setenv("VLLM_KV_BLOCK", "7")
    result = CliRunner().invoke(cli, ["check-config"])
    assert result.exit_code == 0
    assert "VLLM_KV_BLOCK is not a variable that trio-llm reads; did you mean VLLM_KV_BLOCKS?" in result.output


def test_check_config_counts_what_was_given(tmp_path: Path) -> None:
    """A good file is confirmed, with the number of settings it holds."""
    path = tmp_path / "settings.yaml"
    path.write_text("server: {port: 1}\nengine: {seed: 3}")
    result = CliRunner().invoke(cli, ["check-config", "-c", str(path)])
    assert result.output == f"ok: 2 of {len(list(fields()))} settings are given, the others have their defaults\n"


def test_help_shows_every_setting() -> None:
    """Each flag of each setting stands in `trio-llm serve --help`."""
    shown = CliRunner().invoke(cli, ["serve", "--help"]).output
    for _, field in fields():
        for flag in field.metadata["flags"]:
            assert flag in shown


def test_the_environment_report_names_what_a_bug_report_needs() -> None:
    """`collect-env` tells versions and hardware, whether or not there is a GPU."""
    shown = CliRunner().invoke(cli, ["collect-env"]).output
    for word in ("trio-llm", "python", "torch", "quart-trio", "cores usable", "memory", "gpu"):
        assert word in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_of_other_servers_are_refused_with_a_hint(name: str) -> None:
    """A command that Ollama or vLLM has is an error that says what to do instead."""
    result = CliRunner().invoke(cli, [name, "some/model"])
    assert result.exit_code == 2
    assert f"No such command: {name}. {COMMANDS[name]}" in result.output
    assert name not in cli.commands


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("serv", "Did you mean serve?"),
        ("owner/name", "use `trio-llm serve owner/name`"),
        ("xyz", "There are bench, chat,"),
    ],
)
def test_an_unknown_command_is_refused_with_the_closest_one(word: str, hint: str) -> None:
    """A misspelt command, and a model where a command belongs, are errors that say what was meant."""
    result = CliRunner().invoke(cli, [word])
    assert result.exit_code == 2
    assert hint in result.output


@pytest.mark.parametrize("extra", [["b"], ["b", "c"]])
def test_a_flag_with_several_values_is_repeated(extra: list[str]) -> None:
    """`--served-model-name a b`, as vLLM spells it, says how to spell it here; b is not taken for the model."""
    result = CliRunner().invoke(cli, ["serve", "--served-model-name", "a", *extra])
    assert result.exit_code == 2
    assert "is repeated: --served-model-name A --served-model-name B." in result.output


def test_seed_is_that_of_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate --seed` and `chat --seed` seed sampling, not the random weights of --load-format dummy."""
    seen: list[Any] = []
    monkeypatch.setattr("trio_llm.cli.generate.run", lambda settings, prompts, **options: seen.append(options["seed"]))
    monkeypatch.setattr("trio_llm.cli.chat.run", lambda *args: seen.append(args[-1]["seed"]))
    for command in (["generate", "hi"], ["chat"]):
        result = CliRunner().invoke(cli, [*command, "--seed", "7"])
        assert result.exit_code == 0, result.output
    assert seen == [7, 7]


@pytest.mark.parametrize("source", ["--file", "stdin"])
def test_prompts_that_are_not_utf8_are_refused(source: str, tmp_path: Path) -> None:
    """Bytes that are no text are one line, from a file and from stdin."""
    data = b"What is\xbe?\n"
    (tmp_path / "prompts").write_bytes(data)
    given = ["--file", str(tmp_path / "prompts")] if source == "--file" else []
    result = CliRunner().invoke(cli, ["generate", *given], input=data)
    assert result.exit_code == 2
    assert re.search(r"Error: The prompts in \S+ are not UTF-8: invalid start byte\.\n", result.output)


def test_prompts_come_from_one_place(tmp_path: Path) -> None:
    """A file beside prompts on the command line is refused, not left out silently."""
    (tmp_path / "prompts").write_text("Hello\n")
    result = CliRunner().invoke(cli, ["generate", "Hi", "--file", str(tmp_path / "prompts")])
    assert result.exit_code == 2
    assert "Error: Give the prompts as arguments or with --file, not both.\n" in result.output


@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: BaseExceptionGroup("", [error])])
def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Any], BaseException]) -> None:
    """Ctrl-C ends any command with a shell's exit code for it, no traceback, also out of a nursery."""

    def interrupted(*_: object, **__: object) -> None:
        raise wrap(KeyboardInterrupt())

    monkeypatch.setattr("trio_llm.cli.generate.run", interrupted)
    result = CliRunner().invoke(cli, ["generate", "hi"])
    assert (result.exit_code, result.output.strip()) == (130, "")


def test_an_interrupt_before_the_commands_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the commands are imported ends the same way."""

    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trio_llm.cli.commands.cli", interrupted)
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 130
