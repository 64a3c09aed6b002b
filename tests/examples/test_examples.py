"""Every file in examples/ runs as it stands, against a server with the demo model, and prints what it promises."""

from __future__ import annotations

import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.process import serving

EXAMPLES = Path(__file__).parents[2] / "examples"
# What the output of each must hold.
SAYS = {
    "curl.sh": ["The capital of Japan is Tokyo.", "data: [DONE]", '"object":"list"', '"count"', '"status"'],
    "openai_client.py": ["The capital of Japan is Tokyo.", "tokens in"],
    "async_client.py": ["Japan: The capital of Japan is Tokyo.", "Norway: "],
    "structured_output.py": ["Zoe is 7", "The capital of Japan is Tokyo.", "\nTokyo\n"],
    "tools.py": ['get_weather({"city": "Paris"}) -> {', "It is sunny and 21 degrees in Paris."],
    "batch.py": ["completed", "France -> The capital of France is Paris.", "Japan -> The capital of Japan is Tokyo."],
    "embeddings.py": ["The capital of Japan is Tokyo.", "Tom has a red kite."],
    "offline.py": ["The capital of Japan is Tokyo.", "The capital of Egypt is Cairo.", "'Once upon a time' ->"],
    "async_engine.py": ["'Once upon a time' + ", "'The little owl' + "],
    "scheduler_loop.py": ["step 1: rows (0, 1)", "'The little owl' ends ("],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server as the examples ask for, on a free port; return its base URL."""
    data_dir = tmp_path_factory.mktemp("examples") / "data"
    flags = ["--data-dir", str(data_dir), "--num-gpu-blocks-override", "256"]
    with serving(*flags) as server:
        yield f"{server.url}/v1"


def test_every_example_is_listed() -> None:
    """The README of the folder has a line for each, and each has a line here."""
    programs = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert programs == SAYS.keys()
    assert programs == set(re.findall(r"^\| \[(.+?)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """It ends without an error and prints what it is there to show."""
    monkeypatch.setenv("OPENAI_BASE_URL", server)
    if name.endswith(".sh"):
        subprocess.run([EXAMPLES / name], check=True)
    else:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capfd.readouterr().out
    assert [text for text in SAYS[name] if text not in printed] == [], printed
