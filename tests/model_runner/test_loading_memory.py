"""What loading takes beside the weights, in the resident memory of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tests.gguf.files import write
from tests.model.families import SHAPED, save

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
MIB = 2**20
# A mapped part of the file (16 MiB), the largest matrix, what it is packed from, and the ends of huge pages.
BESIDE_BYTES = 32 * MIB
SHAPE = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10,
    "tie_word_embeddings": True,
}  # fmt: skip
LOAD = """
import json, sys
from pathlib import Path
from trio_llm.config import EngineConfig
from trio_llm.model.load import load_runner

def load(path):
    return load_runner(EngineConfig(model=path, device="cpu", num_kv_blocks=2, max_batch_size=1, enforce_eager=True))

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

load(sys.argv[1]).close()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmHWM")
runner = load(sys.argv[2])
print(json.dumps([resident("VmHWM") - before, runner.budget.weight_bytes]))
"""


def _write(model: Any, path: Path, kind: str) -> Path:
    if kind == "safetensors":
        return save(model.bfloat16(), path)
    return write(model, path.with_suffix(".gguf"), lambda _: gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", ["safetensors", "F32", "Q8_0"])
def test_the_peak_is_the_weights_and_little_more(kind: str, tmp_path: Path) -> None:
    """No second copy of the weights is there at any time, and nothing is kept of what was freed."""
    torch.manual_seed(0)
    small, large = SHAPED["llama"](hidden_size=64, intermediate_size=96), SHAPED["llama"](**SHAPE)
    paths = [_write(small, tmp_path / "small", kind), _write(large, tmp_path / "large", kind)]
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, paths)], capture_output=True, text=True, check=True)
    peak_bytes, weight_bytes = json.loads(done.stdout)
    assert weight_bytes > 24 * MIB
    assert 0 < peak_bytes - weight_bytes < BESIDE_BYTES
