"""The process that runs Ray for the tests: it reads commands, a line of JSON each, and answers each with one.

Ray is not imported in pytest's process: its warnings, threads and signal handlers stay here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private import state

from tests.ray_serve.gate import open_gated_engine
from trio_llm.ray_serve.app import NAME, application

_POLL_S, _WAIT_S = 0.05, 250.0


def deploy(arguments: dict[str, Any]) -> None:
    """Deploy, and wait until it is so."""
    serve.run(application(arguments, open_gated_engine), name="test")


def replicas() -> dict[str, int]:
    """Return the process id of each live replica, by its name."""
    found = {}
    for actor in state.actors().values():
        prefix, _, name = actor["Name"].rpartition("#")
        if prefix == f"SERVE_REPLICA::test#{NAME}" and actor["State"] == "ALIVE":
            found[name] = actor["Pid"]
    return found


def wait(count: int) -> dict[str, int]:
    """Wait until so many replicas run, and no other is alive; return them."""

    def reached() -> bool:
        states = serve.status().applications["test"].deployments[NAME].replica_states
        running = {str(name): number for name, number in states.items() if number}
        # A replica that was killed is still RUNNING for a moment.
        return running == {"RUNNING": count} and len(replicas()) == count

    _wait_for(reached)
    return replicas()


def delete(directory: str) -> None:
    """Remove the application, and wait until each replica says that it waits for its requests."""
    directories = Path(directory, "session_latest/logs/serve")
    logs = [next(directories.glob(f"replica_*_{name}.log")) for name in replicas()]
    serve.delete("test", _blocking=False)
    _wait_for(lambda: all(": 1 ongoing requests" in path.read_text(encoding="utf-8") for path in logs))


def _wait_for(reached: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _WAIT_S
    while not reached():
        if time.monotonic() > deadline_s:
            raise TimeoutError(serve.status())
        time.sleep(_POLL_S)  # Ray tells nobody when it has changed.


COMMANDS = {"deploy": deploy, "wait": wait, "delete": delete}


def main(port: int, directory: str) -> None:
    """Run Ray on loopback until the input ends."""
    ray.init(num_cpus=8, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=directory)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    with open(3, "w", encoding="utf-8", buffering=1) as answers:  # Standard output has Ray's own lines.
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(COMMANDS[name](*arguments)), file=answers)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
