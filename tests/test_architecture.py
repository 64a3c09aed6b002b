"""What keeps the code base readable and safe, checked on its syntax trees: sizes, floors, and things never used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from trio_llm.cli.settings import fields

ROOT = Path(__file__).parents[1]
PACKAGES = ("trio_llm", "cuda_kernels", "cpu_kernels", "kernel_cache")
PRODUCT = sorted(path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py"))
SOURCES = sorted([*PRODUCT, *ROOT.glob("tools/**/*.py")])
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
# Calls that turn data into code, or that trust what a checkpoint or a client sent.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("os", "system")}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "transformers"}
# What the engine is measured beside, and what a checkpoint is compared with on request.
ALLOWED_MODULES = {
    "tools/kernel_lab/end_to_end.py": {"transformers"},
    "trio_llm/verify/reference.py": {"transformers"},
}


def name_of(path: Path) -> str:
    """Write a path as the project's own people would."""
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function of a module, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines from `def` to its end, apart from its docstring and from functions inside it."""
    lines = _span(function)
    if ast.get_docstring(function) is not None:
        lines -= _span(function.body[0])
    return lines - sum(map(_span, _nested(function)))


def _span(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _nested(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in function.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level name of every module that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    """No file is over 400 lines, and no function over 40 without its docstring."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    long = {function.name: length(function) for function in functions(ast.parse(text))}
    assert {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_turns_data_into_code(path: Path) -> None:
    """No eval, no pickle, no torch.load: a checkpoint, a template or a request is never run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert (FORBIDDEN_MODULES - ALLOWED_MODULES.get(name_of(path), set())).isdisjoint(imported(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, node.lineno
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            assert (node.func.value.id, node.func.attr) not in FORBIDDEN_ATTRIBUTES, node.lineno


def test_the_floors_hold() -> None:
    """No floor imports one above it, and none imports what its contract forbids (pyproject.toml)."""
    # In a process of its own: it switches off the loggers of whatever runs beside it.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_setting_is_read_by_something() -> None:
    """No setting is only parsed and printed: each one's name is read outside the configuration and its loader.

    Or in a property of the configuration that is read there.
    """
    loaders = {
        ROOT / "trio_llm/config.py",
        ROOT / "trio_llm/limits.py",
        ROOT / "trio_llm/cli/settings.py",
        ROOT / "trio_llm/cli/options.py",
    }
    read = {
        node.attr
        for path in set(SOURCES) - loaders
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    declared = ast.parse((ROOT / "trio_llm/config.py").read_text(encoding="utf-8"))
    for function in reversed(list(functions(declared))):
        if function.name in read and [ast.unparse(mark) for mark in function.decorator_list] == ["property"]:
            read |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    names = {field.name for _, field in fields()}
    assert names - read == set()


def test_every_library_is_declared() -> None:
    """What the package imports stands among its dependencies: an environment made from them is complete."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = {
        "cupy",
        "pytest",
        "cuda",
        "cycler",
        "gguf",
        "transformers",
        "IPython",
        "ipywidgets",
        "matplotlib",
        "opentelemetry",
        "playwright",
        "ray",
        "starlette",
        "zmq",
    }  # Imported inside functions, and missed in plain words.
    spelled = {"pyyaml": "yaml"}
    names = {re.split(r"[<>=;\[ ]", line)[0] for line in project["dependencies"]}
    declared = {spelled.get(name, name.replace("-", "_")) for name in names}
    own = {*PACKAGES, "tools"}
    used = {name for path in SOURCES for name in imported(ast.parse(path.read_text(encoding="utf-8")))}
    assert used - set(sys.stdlib_module_names) - own - declared - optional == set()
    assert declared - used == set()


def test_every_test_has_a_deadline(request: pytest.FixtureRequest) -> None:
    """A test that hangs fails with the stacks of all threads; so does one that no signal handler can interrupt."""
    assert 0 < float(request.config.getini("timeout")) < float(request.config.getini("faulthandler_timeout"))
    assert request.config.getini("faulthandler_exit_on_timeout") is True
