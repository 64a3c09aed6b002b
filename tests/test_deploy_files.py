"""The files under deploy/ are well formed for the tools that read them, and say what the server knows.

No container runs here: images, compose and the clusters' controllers are not tried, only their files' rules.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import crossplane
import kubernetes_validate
import promql_parser
import pytest
import yaml
from click.testing import CliRunner

from tests.server.helpers import ask
from tests.server.stub import open_stub
from trio_llm.cli.commands import cli
from trio_llm.config import Config
from trio_llm.server.app import create_app

DEPLOY = Path(__file__).parents[1] / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile*"))
UNIT = DEPLOY / "systemd/trio-llm.service"


def documents(name: str) -> list[Any]:
    """Return the YAML documents of a file under deploy/."""
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions and their arguments."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]  # pyright: ignore[reportReturnType]


def entry_point(path: Path) -> list[str]:
    """Return the command line of an image."""
    (found,) = [value for name, value in instructions(path) if name == "ENTRYPOINT"]
    return yaml.safe_load(found)


def container() -> Any:
    """Return the container of the Kubernetes deployment."""
    return documents("kubernetes/trio-llm.yaml")[0]["spec"]["template"]["spec"]["containers"][0]


def unit() -> dict[str, str]:
    """Return the settings of the systemd unit."""
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def command_lines() -> dict[str, list[str]]:
    """Return every command line that a file of deploy/ starts a server with, by file."""
    image = entry_point(DEPLOY / "docker/Dockerfile")
    compose = shlex.split(documents("docker/compose.yaml")[0]["services"]["trio-llm"]["command"])
    kserve = documents("kubernetes/kserve.yaml")[0]["spec"]["predictor"]["containers"][0]
    return {
        **{path.name: entry_point(path) for path in DOCKERFILES},
        "compose.yaml": image + [word for word in compose if not word.startswith("$")],
        "trio-llm.yaml": image + container()["args"],
        "kserve.yaml": image + kserve["args"],
        "trio-llm.service": shlex.split(unit()["ExecStart"]),
    }


def seconds(line: list[str]) -> float:
    """Return for how long a server of this command line may take to stop."""
    server = Config().server
    drain = float(line[line.index("--drain-delay") + 1]) if "--drain-delay" in line else server.drain_delay_s
    return drain + server.shutdown_timeout_s


@pytest.mark.parametrize("file", command_lines())
def test_the_command_line_takes_every_flag(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flag exists and its value is allowed."""
    monkeypatch.chdir(tmp_path)
    program, *arguments = command_lines()[file]
    assert Path(program).name == "trio-llm"
    done = CliRunner().invoke(cli, [*arguments, "--print-config"])
    # Without a GPU, cuda is refused; by then every flag has been read.
    assert done.exit_code == 0 or "--device" in arguments, done.output
    assert "No such option" not in done.output


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_small_pinned_and_without_root(path: Path) -> None:
    """Hadolint finds nothing; the base has a full version; the last stage drops root and checks its health."""
    done = subprocess.run(["hadolint", "--ignore", "DL3013", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    steps = instructions(path)
    bases = [value for name, value in steps if name == "FROM"]
    assert len(bases) == 2 and all(base.split(" ")[0].startswith("python:3.12.8-slim") for base in bases)
    last = steps[[name for name, _ in steps].index("FROM", 1) :]
    assert ("USER", "10001") in last
    assert any(name == "HEALTHCHECK" and "/health" in value for name, value in last)
    assert ("EXPOSE", str(Config().server.port)) in last
    # What is copied from the context is what .dockerignore lets through.
    context = {word for name, value in steps if name == "COPY" and "--from" not in value for word in value.split()[:-1]}
    ignored = (DEPLOY.parent / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert context == {line[1:] for line in ignored if line.startswith("!")}
    assert all((DEPLOY.parent / name).exists() for name in context)


def test_the_hidden_faults_of_a_dockerfile_are_found(tmp_path: Path) -> None:
    """The linter is not blind."""
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN cd /tmp && sudo ls\n")
    assert subprocess.run(["hadolint", str(bad)], capture_output=True, check=False).returncode == 1


def test_compose_names_files_that_exist() -> None:
    """Each mounted file and the Dockerfile exist; a stop leaves time to drain; volumes are declared."""
    (compose,) = documents("docker/compose.yaml")
    folder = DEPLOY / "docker"
    server = compose["services"]["trio-llm"]
    assert (folder / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    assert float(server["stop_grace_period"].removesuffix("s")) > seconds(command_lines()["compose.yaml"])
    for service in compose["services"].values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source.startswith("$") or source in compose["volumes"] or (folder / source).exists(), mount
    (job,) = documents("docker/prometheus.yml")[0]["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"trio-llm:{Config().server.port}"]}]


def test_kubernetes_accepts_the_manifests() -> None:
    """Every built-in kind fits its schema, strictly; a wrong field would not."""
    for document in documents("kubernetes/trio-llm.yaml"):
        kubernetes_validate.validate(document, "1.31", strict=True)
    document = documents("kubernetes/trio-llm.yaml")[0]
    document["spec"]["template"]["spec"]["terminationGraceSeconds"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.31", strict=True)


@pytest.mark.parametrize("file", ["trio-llm.yaml", "kserve.yaml"])
def test_pods_do_not_throttle_the_router(file: str) -> None:
    """In a cluster one peer sends everything: neither its requests nor its places are limited."""
    line = command_lines()[file]
    assert line[line.index("--rate-limit-requests") + 1] == "0"
    assert line[line.index("--max-caller-share") + 1] == "1"


def test_pods_stop_after_the_server() -> None:
    """The pod lives longer than the drain, and the readiness probe fails within the drain delay."""
    pod = documents("kubernetes/trio-llm.yaml")[0]["spec"]["template"]["spec"]
    line = command_lines()["trio-llm.yaml"]
    assert pod["terminationGracePeriodSeconds"] > seconds(line)
    probe = container()["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < float(line[line.index("--drain-delay") + 1])
    assert float(unit()["TimeoutStopSec"]) > seconds(command_lines()["trio-llm.service"])


async def test_probes_and_scrapers_ask_for_what_is_there() -> None:
    """Each path of a probe, and the metrics, are answered without a key when the others need one."""
    paths = {container()[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    (monitor,) = documents("kubernetes/servicemonitor.yaml")
    (endpoint,) = monitor["spec"]["endpoints"]
    async with open_stub() as engine:
        app = create_app(engine, Config())
        for path in (*paths, endpoint["path"]):
            assert (await ask(app, "GET", path)).status == 200
    labels = documents("kubernetes/trio-llm.yaml")[1]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    assert endpoint["port"] in {port["name"] for port in documents("kubernetes/trio-llm.yaml")[1]["spec"]["ports"]}


async def test_alerts_ask_for_series_that_exist() -> None:
    """Every expression parses, and names series and labels of /metrics or of Prometheus itself."""
    async with open_stub() as engine:
        app = create_app(engine, Config())
        await ask(app, "POST", "/v1/completions", {"prompt": "a"}, headers={"content-type": "application/json"})
        page = (await ask(app, "GET", "/metrics")).body.decode()
    (group,) = documents("alerts.yml")[0]["groups"]
    assert len(group["rules"]) >= 6
    for rule in group["rules"]:
        promql_parser.parse(rule["expr"])
        for name in set(promql_selectors(rule["expr"])) - {"up"}:
            assert f"\n{name}" in page, name
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
    with pytest.raises(ValueError, match="parenthesis"):
        promql_parser.parse("rate(x[5m]")
    for config in ("prometheus.yml", "docker/prometheus.yml"):
        assert documents(config)[0]["rule_files"] == ["alerts.yml"]


def promql_selectors(expression: str) -> list[str]:
    """Return the series that an expression reads."""
    return re.findall(r"([a-z_:]+)\{", expression)


def test_nginx_parses_the_proxy(tmp_path: Path) -> None:
    """Every directive exists, stands where it may, and has its arguments; the longest request is not cut."""
    main_file = tmp_path / "nginx.conf"
    main_file.write_text(f"events {{}}\nhttp {{ include {DEPLOY / 'nginx/trio-llm.conf'}; }}\n")
    parsed = crossplane.parse(str(main_file))
    assert parsed["status"] == "ok", parsed["errors"]
    server = parsed["config"][1]["parsed"][1]
    (location,) = [block for block in server["block"] if block["directive"] == "location"]
    directives = {block["directive"]: block["args"] for block in location["block"]}
    assert directives["proxy_buffering"] == ["off"]
    assert float(directives["proxy_read_timeout"][0].removesuffix("s")) > Config().limits.request_timeout_s
    main_file.write_text("events {}\nhttp { server { proxy_bufering off; } }\n")
    assert crossplane.parse(str(main_file), strict=True)["status"] == "failed"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """systemd-analyze finds no unknown setting and no bad value."""
    text = UNIT.read_text(encoding="utf-8")
    text = text.replace("/opt/trio-llm/bin/trio-llm", "/bin/true").replace("User=trio-llm", "User=root")
    (tmp_path / "trio-llm.service").write_text(text)

    def verify() -> str:
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "trio-llm.service")]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    assert "trio-llm.service" not in verify()
    (tmp_path / "trio-llm.service").write_text(text + "\n[Service]\nTimeoutStopSecs=5\n")
    assert "TimeoutStopSecs" in verify()
