"""The documentation is held to the code: it names every setting, variable, endpoint and metric, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import fields as struct_fields

from tests.server.helpers import ask
from tests.server.stub import open_stub
from trio_llm.cli.announce import ready_text
from trio_llm.cli.options import as_text
from trio_llm.cli.settings import fields
from trio_llm.config import Config
from trio_llm.model.families.registry import FAMILIES
from trio_llm.server.app import create_app
from trio_llm.server.bodies.foreign_fields import hinted_fields, unsupported_fields
from trio_llm.server.bodies.types import ChatBody, CompletionBody

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(ROOT.glob("docs/*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES]
MAX_README_BYTES = 10_000
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier())
WRITTEN_LATER = {"cuda_kernels/VERIFIED.json"}  # by the first run on a GPU


def page(name: str) -> str:
    """Read one page of docs/."""
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def section(name: str, title: str) -> str:
    """Cut one section out of a page."""
    return re.split(r"^#+ ", page(name).split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(name: str, title: str) -> list[list[str]]:
    """Return the cells of a section's table without its header row."""
    lines = [line for line in section(name, title).splitlines() if line.startswith("|")]
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


def metric_rows(exported: str) -> Iterator[list[str]]:
    """Write the table of metrics from a /metrics page: name, type and meaning of each."""
    for match in re.finditer(r"^# HELP (\S+) (.*)\n# TYPE \S+ (\w+)$", exported, re.MULTILINE):
        name, help_text, kind = match.groups()
        if not name.endswith("_created"):
            yield [f"`{name}`", kind, help_text]


def test_every_setting_is_documented() -> None:
    """The table of settings is what the code declares: keys, defaults, flags and meanings."""
    assert rows("settings", "Settings") == list(setting_rows())


def test_every_variable_is_documented() -> None:
    """The table of environment variables is what the code reads."""
    assert rows("settings", "Environment") == list(variable_rows())


def test_config_yaml_explains_every_setting() -> None:
    """The comment above each key of config.yaml is the setting's own text."""
    lines = (ROOT / "config.yaml").read_text(encoding="utf-8").splitlines()
    for key, field in fields():
        end = next(number for number, line in enumerate(lines) if line.startswith(f"  {field.name}:"))
        start = end
        while lines[start - 1].startswith("  #"):
            start -= 1
        comment = " ".join(line.removeprefix("  # ") for line in lines[start:end])
        assert comment == field.metadata["help"], key


def test_every_parameter_is_documented() -> None:
    """The table of parameters has the fields of both bodies, and the table of refused ones has what is refused."""
    documented = {
        (name.strip("`"), place)
        for name, places, _ in rows("parameters", "Accepted")
        for place in (("chat", "completions") if places == "both" else (places,))
    }
    bodies = {"chat": ChatBody, "completions": CompletionBody}
    accepted = {(field.encode_name, place) for place, body in bodies.items() for field in struct_fields(body)}
    assert documented == accepted
    refused = set(unsupported_fields(ChatBody)) - {name for name, _ in accepted}
    assert refused <= set(re.findall(r"`(\w+)`", section("parameters", "Refused")))
    assert set(hinted_fields(ChatBody)) <= set(re.findall(r"`(\w+)`", section("parameters", "Accepted as hints")))


async def test_every_endpoint_is_documented() -> None:
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
        for methods, paths, *_ in rows("serving", "Endpoints")
        for method in methods.split(", ")
        for path in re.findall(r"`([^`]+)`", paths)
    }
    assert told == served


async def test_every_metric_is_documented(tmp_path: Path) -> None:
    """The table of metrics is what /metrics exports where all that has its own is on, with types and meanings."""
    events = f'{{"enable_kv_cache_events": true, "endpoint": "ipc://{tmp_path}/events"}}'
    async with open_stub(spec_method="ngram", record=str(tmp_path), kv_events_config=events) as engine:
        exported = await ask(create_app(engine, Config()), "GET", "/metrics")
    assert rows("metrics", "Metrics") == list(metric_rows(exported.body.decode()))


def test_every_model_family_is_documented() -> None:
    """What can be loaded is what the registry knows."""
    told = set(re.findall(r"`(\w+For\w+)`", section("models", "Models")))
    assert told == set(FAMILIES)


def test_the_lines_to_paste_are_those_that_serve_prints() -> None:
    """The curl lines of the quickstart are the ones printed when the server is ready."""
    from tests.cli.test_console import INFO

    printed = ready_text(Config(), INFO, "demo", "http://0.0.0.0:8000").split("Ask it:\n\n")[1]
    for command in printed.split("\n\n"):
        told = "\n".join(line.removeprefix("  ") for line in command.strip().splitlines())
        assert told in README
        assert told in page("getting-started")


def test_two_commands_do_all_set_up() -> None:
    """The README keeps the command that serves and the one that tests, which CI runs as it stands here."""
    for command in ("pip install . && trio-llm serve", "pip install '.[test]' && pytest"):
        assert f"```sh\n{command}\n```" in README


def test_the_readme_stays_short() -> None:
    """The README is under 10 KB; what does not fit is in docs/, and the README links every page."""
    assert len(README.encode()) < MAX_README_BYTES
    linked = set(re.findall(r"\]\(docs/([^)]+\.md)\)", README))
    assert linked == {path.name for path in PAGES} - {"index.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link of the documents points to a file of the repository."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_named_exists(document: Path) -> None:
    """A path of the repository in a document, such as `trio_llm/config.py`, is a file or folder that exists."""
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", document.read_text(encoding="utf-8"))
    assert [path for path in named if path not in WRITTEN_LATER and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("direction", ["In: from the request to the plan", "Out: from the result to the bytes"])
def test_the_life_of_a_request_names_real_functions(direction: str) -> None:
    """Each file of the walk has the functions that the walk names, and there are at most 16 files in and 10 out."""
    walk = [
        (path.strip("`"), re.findall(r"`(\w+)`", functions))
        for _, path, functions, _ in rows("architecture", direction)
    ]
    assert 0 < len(walk) <= (16 if direction.startswith("In") else 10)
    for path, functions in walk:
        defined = set(re.findall(r"(?:def|class) (\w+)", (ROOT / path).read_text(encoding="utf-8")))
        assert functions and set(functions) <= defined, path


def test_every_notebook_is_documented() -> None:
    """The table of notebooks is what the folder holds."""
    told = re.findall(r"^\| `notebooks/([^`]+)`", page("notebooks"), re.MULTILINE)
    assert sorted(told) == sorted(path.name for path in ROOT.glob("notebooks/*.ipynb"))
