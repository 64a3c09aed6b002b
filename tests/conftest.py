"""What every test gets: no network, no VLLM_* variables of yours, reproducible Hypothesis, GPU tests only on GPUs."""

from __future__ import annotations

import contextvars
import gc
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports transformers or tokenizers: nothing is looked up on a hub, and no fork warning is printed.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import hypothesis
import pytest

# No deadline: a test never fails because the machine is busy. Derandomised: a failure here is a failure everywhere.
hypothesis.settings.register_profile("trio-llm", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("trio-llm")

_connect = socket.socket.connect


def _connect_on_this_machine(self: socket.socket, address: Any) -> None:
    """Connect, unless the address is not on this machine."""
    if self.family != socket.AF_UNIX and not (address[0] == "localhost" or address[0].startswith(("127.", "::1"))):
        raise RuntimeError(
            f"a test tried to reach {address}: tests never touch the network (only the fixtures of tests/real do, once)"
        )
    _connect(self, address)


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the developer's environment, files and network out of every test."""
    # Where a server that is not told otherwise keeps uploads and batches.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(socket.socket, "connect", _connect_on_this_machine)
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)


# The project's context variables. torch's compiler leaves one of its own behind.
_OURS = {"caller", "capturing", "dispatch", "host_forbidden", "recorder", "share_of"}


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Undo what a command that runs in this process sets for the whole of it: a later test meets the same process.

    pytest keeps every record that the root logger's level lets through, so a level left behind looks like a leak. A
    context variable left behind chooses kernels for a later test: that is a failure, of the test that set it.
    """
    variables = set(contextvars.copy_context())
    root, thresholds = logging.getLogger(), gc.get_threshold()
    level, handlers = root.level, root.handlers[:]
    yield
    gc.set_threshold(*thresholds)
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    assert not _OURS & {variable.name for variable in set(contextvars.copy_context()) - variables}


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from a run that does not ask for them: what is tested then is the same on every machine."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


_SLOW_TIMEOUT_S = 900.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests a later deadline. Skip GPU tests where there is no GPU; import torch only if there are some.

    Files with the slowest tests come first: a worker that began one at the end would leave the others idle.
    """
    slowest = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in slowest)
    for item in items:
        if any(item.get_closest_marker(name) for name in ("slow", "notebook", "kernels_full")):
            item.add_marker(pytest.mark.timeout(_SLOW_TIMEOUT_S))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run these with -m gpu"))
