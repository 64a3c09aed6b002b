"""The README is held to the code: every setting, variable, endpoint and metric stands in it, and nothing else does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.helpers import ask
from tests.server.stub import open_stub
from trio_llm.cli.announce import ready_text
from trio_llm.cli.options import as_text
from trio_llm.cli.settings import fields
from trio_llm.config import Config
from trio_llm.model.registry import FAMILIES
from trio_llm.server.app import create_app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Cut one section out of the README."""
    return re.split(r"^#+ ", README.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(title: str) -> list[list[str]]:
    """Return the cells of a section's table, its head apart."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def setting_rows() -> Iterator[list[str]]:
    """Write the table of settings from their declarations."""
    for key, field in fields():
        flags = ", ".join(f"`{flag}`" for flag in field.metadata["flags"])
        yield [f"`{key}`", f"`{as_text(field.default)}`", flags, field.metadata["help"]]


def variable_rows() -> Iterator[list[str]]:
    """Write the table of environment variables from the settings' declarations."""
    for key, field in fields():
        if (variable := field.metadata["env"]) is not None:
            yield [f"`{variable}`", f"`{key}`", f"`{as_text(field.default)}`"]


def metric_rows(page: str) -> Iterator[list[str]]:
    """Write the table of metrics from a /metrics page: name, type and meaning of each."""
    for match in re.finditer(r"^# HELP (\S+) (.*)\n# TYPE \S+ (\w+)$", page, re.MULTILINE):
        name, help_text, kind = match.groups()
        if not name.endswith("_created"):
            yield [f"`{name}`", kind, help_text]


def test_every_setting_stands_in_the_readme() -> None:
    """The table of settings is what the code declares: keys, defaults, flags and meanings."""
    assert rows("Settings") == list(setting_rows())


def test_every_variable_stands_in_the_readme() -> None:
    """The table of environment variables is what the code reads."""
    assert rows("Environment") == list(variable_rows())


async def test_every_endpoint_stands_in_the_readme() -> None:
    """The table of endpoints is the app's, method by method."""
    async with open_stub() as engine:
        app = create_app(engine, Config())
        served = {
            (method, rule.rule.replace("path:", ""))
            for rule in app.url_map.iter_rules()
            for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        }
    told = {
        (method, path)
        for methods, paths, *_ in rows("Endpoints")
        for method in methods.split(", ")
        for path in re.findall(r"`([^`]+)`", paths)
    }
    assert told == served


async def test_every_metric_stands_in_the_readme() -> None:
    """The table of metrics is what /metrics exports where tokens are guessed, each with its type and meaning."""
    async with open_stub(spec_method="ngram") as engine:
        page = await ask(create_app(engine, Config()), "GET", "/metrics")
    assert rows("Metrics") == list(metric_rows(page.body.decode()))


def test_the_readme_lists_the_model_families() -> None:
    """What can be loaded is what the registry knows."""
    told = set(re.findall(r"`(\w+For\w+)`", section("Models")))
    assert told == set(FAMILIES)


def test_the_lines_to_paste_are_those_that_serve_prints() -> None:
    """The curl lines of the quickstart are the ones printed when the server is ready."""
    from tests.cli.test_console import INFO

    printed = ready_text(Config(), INFO, "demo", "http://0.0.0.0:8000").split("Ask it:\n\n")[1]
    for command in printed.split("\n\n"):
        told = "\n".join(line.removeprefix("  ") for line in command.strip().splitlines())
        assert told in README


def test_two_commands_do_all_set_up() -> None:
    """The README keeps the command that serves and the one that tests, which CI runs as it stands here."""
    for command in ("pip install . && trio-llm serve", "pip install '.[test]' && pytest"):
        assert f"```sh\n{command}\n```" in README


@pytest.mark.parametrize("document", ["README.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    """Every relative link of the documents points to a file of the repository."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_notebook_stands_in_the_readme() -> None:
    """The table of notebooks is what the folder holds."""
    told = re.findall(r"\(notebooks/([^)]+)\)", README)
    assert sorted(told) == sorted(path.name for path in ROOT.glob("notebooks/*.ipynb"))
