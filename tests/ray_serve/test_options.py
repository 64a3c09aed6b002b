"""What `serve run` says is checked before Ray starts a replica: no Ray here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from trio_llm.errors import ConfigError
from trio_llm.ray_serve.options import Options

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work where there is no config.yaml."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("text", [True, False], ids=["command line", "config file"])
def test_values_may_be_text(text: bool) -> None:
    """`serve run` passes text, Serve's config files pass numbers."""
    arguments: dict[str, Any] = {"num_replicas": 2, "max_replicas": 3, "num_gpus": 0.5, "prefix_affinity": False}
    given = {name: str(value) for name, value in arguments.items()} if text else arguments
    options = Options.parse(given, {})
    assert (options.num_replicas, options.max_replicas, options.num_gpus) == (2, 3, 0.5)
    assert not options.prefix_affinity


def test_the_settings_are_those_of_serve(tmp_path: Path) -> None:
    """From a file or a mapping, with the environment's between defaults and mapping."""
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {max_batch_size: 8}")
    from_file = Options.parse({"config": str(file)}, {"VLLM_KV_BLOCKS": "64"}).config
    assert (from_file.engine.max_batch_size, from_file.engine.num_kv_blocks) == (8, 64)
    mapping = {"config": {"engine": {"max_batch_size": 8, "num_kv_blocks": 32}}}
    given = Options.parse(mapping, {"VLLM_KV_BLOCKS": "64"}).config
    assert (given.engine.max_batch_size, given.engine.num_kv_blocks) == (8, 32)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"replicas": 2}, "replicas"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"num_replicas": "two"}, "num_replicas"),
        ({"num_replicas": 1.5}, "num_replicas"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"num_gpus": -1}, "num_gpus"),
        ({"num_gpus": "nan"}, "num_gpus"),
        ({"num_cpus": "all"}, "num_cpus"),
        ({"owns_batches": True, "num_replicas": 2}, "owns_batches"),
        ({"owns_batches": True, "max_replicas": 2}, "owns_batches"),
        ({"upscale_delay_s": 0}, "upscale_delay_s"),
        ({"downscale_delay_s": "soon"}, "downscale_delay_s"),
        ({"prefix_affinity": "perhaps"}, "prefix_affinity"),
        ({"config": "nowhere.yaml"}, "file"),
        ({"config": {"motor": {}}}, "motor"),
        ({"config": {"engine": {"wheels": 4}}}, "engine.wheels"),
        ({"config": {"engine": {"max_batch_size": 0}}}, "engine.max_batch_size"),
        ({"config": {"engine": {"device": "cuda"}}}, "num_gpus"),
    ],
)
def test_a_mistake_is_named(arguments: dict[str, Any], named: str) -> None:
    """The error names the argument or the setting, and is one line."""
    with pytest.raises(ConfigError) as caught:
        Options.parse(arguments, {})
    assert caught.value.key == named
    assert "\n" not in str(caught.value)


def test_a_replica_without_a_gpu_uses_none() -> None:
    """What Ray has not given to it is another's."""
    assert Options.parse({}, {}).config.engine.device == "cpu"
    assert Options.parse({"num_gpus": 1}, {}).config.engine.device == "auto"


def test_the_example_is_allowed() -> None:
    """deploy/ray/serve.yaml has arguments and settings that exist."""
    (application,) = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text(encoding="utf-8"))["applications"]
    options = Options.parse(application["args"], {})
    assert (options.num_replicas, options.max_replicas, options.config.engine.max_batch_size) == (2, 4, 64)
    assert application["import_path"] == "trio_llm.ray_serve.app:build"


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_the_example_is_rays() -> None:
    """Ray reads it as a config file of Serve."""
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text(encoding="utf-8")))


def test_a_missing_ray_is_one_plain_line() -> None:
    """The import says what to install."""
    code = "import sys; sys.modules['ray'] = None; import trio_llm.ray_serve.app"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "ImportError: replicas on Ray Serve need Ray: pip install 'trio-llm[ray]'"
