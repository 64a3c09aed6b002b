"""A large batch over HTTP: lines a second, the server's memory from upload to download, and what SIGKILL does to it.

    python benchmarks/batch.py                                # 50,000 lines in a file of 100 MiB
    python benchmarks/batch.py --lines 2000 --mib 4 --kills 20

A real `trio-llm serve` with the demo model and a real disk. Every line of the result is compared with its request and,
after kills, with the result of a run without any; exit code 1 if one is lost, doubled or changed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
POLL_S = 0.25
PADDING = "".join(map(chr, range(33, 127))).replace('"', "").replace("\\", "") * 6


class Server:
    """A server process on a data directory."""

    def __init__(self, directory: Path, flags: list[str]) -> None:
        command = [sys.executable, "-m", "trio_llm", "serve", "--host", "127.0.0.1", "--port", "0"]
        # In bfloat16 a token depends in its last bits on who shares the step, and after a kill others do.
        command += ["--dtype", "float32", "--log-level", "warning", "--data-dir", str(directory), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.port = 0

    def wait_until_ready(self) -> None:
        """Wait for the line that tells where it listens."""
        assert self.process.stdout is not None
        said = ""
        while (found := re.search(r"served on http://127\.0\.0\.1:(\d+)", said)) is None:
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server has ended: {said}")
            said += line
        self.port = int(found[1])

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def memory_mib(self, field: str = "VmRSS") -> float:
        """Return the process's resident memory, or its peak (VmHWM)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) / 1024

    @contextmanager
    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Ask, and read the answer as it comes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{method} {path}: {response.status} {response.read(500)!r}")
            yield response
        finally:
            connection.close()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Ask with JSON, for JSON."""
        data = None if body is None else json.dumps(body)
        with self.request(method, path, data, {"Content-Type": "application/json"}) as response:
            return json.loads(response.read())

    def upload(self, path: Path) -> str:
        """Upload a file in parts, and return its id."""
        head = (
            b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            b'--B\r\nContent-Disposition: form-data; name="file"; filename="requests.jsonl"\r\n\r\n'
        )
        tail = b"\r\n--B--\r\n"

        def parts() -> Iterator[bytes]:
            yield head
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
            yield tail

        headers = {
            "Content-Type": "multipart/form-data; boundary=B",
            "Content-Length": str(len(head) + path.stat().st_size + len(tail)),
        }
        with self.request("POST", "/v1/files", parts(), headers) as response:
            return json.loads(response.read())["id"]

    def submit(self, file_id: str) -> str:
        """Submit a batch and return its id."""
        body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        return self.call("POST", "/v1/batches", body)["id"]


def write_input(path: Path, lines: int, mib: float) -> None:
    """Write an input file of so many lines and about so many bytes; what fills it up is metadata."""
    per_line = int(mib * 1024 * 1024 / lines) - 210
    with path.open("w", encoding="utf-8") as file:
        for number in range(lines):
            body: dict[str, Any] = {"prompt": f"The number {number}", "max_tokens": 2, "temperature": 1, "seed": number}
            body["metadata"] = {
                f"part {part}": PADDING[: min(512, per_line - at)]
                for part, at in enumerate(range(0, min(per_line, 16 * 512), 520))
            }
            line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def wait(server: Server, batch_id: str, curve: list[tuple[str, float]]) -> dict[str, Any]:
    """Wait for a batch's end; note the memory at each quarter."""
    quarters = iter([0.0, 0.25, 0.5, 0.75])
    quarter = next(quarters)
    while (batch := server.call("GET", f"/v1/batches/{batch_id}"))["status"] != "completed":
        counts = batch["request_counts"]
        if batch["status"] in {"failed", "expired", "cancelled"} or counts["failed"]:
            raise RuntimeError(f"the batch has failed: {batch}")
        if batch["status"] == "in_progress" and counts["completed"] >= quarter * counts["total"]:
            curve.append((f"{quarter:.0%} answered", server.memory_mib()))
            quarter = next(quarters, 2.0)
        time.sleep(POLL_S)
    return batch


def read_results(server: Server, file_id: str) -> Iterator[tuple[str, str]]:
    """Yield custom_id and text of each line of an output file, as it arrives."""
    with server.request("GET", f"/v1/files/{file_id}/content") as response:
        for line in response:
            record = json.loads(line)
            yield record["custom_id"], record["response"]["body"]["choices"][0]["text"]


def compare(results: dict[str, str], doubled: int, lines: int, expected: dict[str, str]) -> bool:
    """Print what became of the lines; return whether all is well."""
    wanted = [f"line-{number}" for number in range(lines)]
    lost = sum(custom_id not in results for custom_id in wanted)
    changed = sum(expected.get(custom_id, text) != text for custom_id, text in results.items())
    in_order = list(results) == wanted
    print(f"{lines} lines: {lost} lost, {doubled} doubled, {changed} changed, in order: {in_order}")
    return not lost and not doubled and not changed and in_order


def collect(server: Server, file_id: str) -> tuple[dict[str, str], int]:
    """Return the results by custom_id, and how many came twice."""
    results: dict[str, str] = {}
    doubled = 0
    for custom_id, text in read_results(server, file_id):
        doubled += custom_id in results
        results[custom_id] = text
    return results, doubled


def run_through(directory: Path, source: Path, lines: int, flags: list[str]) -> tuple[dict[str, str], int, float]:
    """Run the batch on one server and print what it cost; return results, doubled lines, and seconds it ran."""
    server = Server(directory, flags)
    try:
        server.wait_until_ready()
        curve = [("ready", server.memory_mib())]
        at = [time.monotonic()]
        file_id = server.upload(source)
        at.append(time.monotonic())
        curve.append(("uploaded", server.memory_mib()))
        batch = wait(server, server.submit(file_id), curve)
        at.append(time.monotonic())
        curve.append(("result files written", server.memory_mib()))
        results, doubled = collect(server, batch["output_file_id"])
        at.append(time.monotonic())
        curve.append(("downloaded", server.memory_mib()))
        uploading, running, downloading = (end - start for start, end in pairwise(at))
        mib = source.stat().st_size / 1024 / 1024
        print("| input | upload s | batch s | lines/s | download s |\n|---|---|---|---|---|")
        print(f"| {lines} lines, {mib:.1f} MiB | {uploading:.1f} | {running:.0f} | ", end="")
        print(f"{lines / running:.0f} | {downloading:.1f} |\n")
        print("| server's resident memory | MiB |\n|---|---|")
        for name, rss in [*curve, ("peak", server.memory_mib("VmHWM"))]:
            print(f"| {name} | {rss:.0f} |")
        print(flush=True)
        return results, doubled, running
    finally:
        server.kill()


def run_killed(
    directory: Path, source: Path, kills: int, run_s: float, dice: random.Random, flags: list[str]
) -> tuple[dict[str, str], int]:
    """Run the batch on servers that are killed at random instants, some while they start; return its results."""
    server = Server(directory, flags)
    try:
        server.wait_until_ready()
        batch_id = server.submit(server.upload(source))
        for number in range(kills):
            time.sleep(dice.uniform(0, 2 * run_s / kills))
            with suppress(OSError, RuntimeError, http.client.HTTPException):
                counts = server.call("GET", f"/v1/batches/{batch_id}")
                told = counts["status"], counts["request_counts"]["completed"]
                print(f"kill {number + 1}: {told[0]}, {told[1]} lines answered", flush=True)
            server.kill()
            server = Server(directory, flags)
            if dice.random() < 0.25:
                time.sleep(dice.uniform(0, 2))
                print("killed again while it started", flush=True)
                server.kill()
                server = Server(directory, flags)
            server.wait_until_ready()
        return collect(server, wait(server, batch_id, [])["output_file_id"])
    finally:
        server.kill()


def main() -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--mib", type=float, default=100.0, help="Size of the input file.")
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs at random instants, in a second run.")
    parser.add_argument("--seed", type=int, default=0, help="Of those instants.")
    arguments, flags = parser.parse_known_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="trio-llm-batch-") as name:
        directory, source = Path(name), Path(name) / "requests.jsonl"
        write_input(source, arguments.lines, arguments.mib)
        whole, doubled, run_s = run_through(directory / "whole", source, arguments.lines, flags)
        well = compare(whole, doubled, arguments.lines, whole)
        if arguments.kills:
            dice = random.Random(arguments.seed)
            results, doubled = run_killed(directory / "killed", source, arguments.kills, run_s, dice, flags)
            well = compare(results, doubled, arguments.lines, whole) and well
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
