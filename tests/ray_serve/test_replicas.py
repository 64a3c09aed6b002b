"""Two replicas of the demo model on a real Ray, and what their clients see of it."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import attrs
import pytest
import trio

from tests.ray_serve.conftest import Cluster
from tests.ray_serve.gate import closed
from tests.server.helpers import http, read_response

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DEADLINE_S = 300.0
NUM_TOKENS = 40


@pytest.fixture
async def replicas(cluster: Cluster) -> dict[str, int]:
    """Two replicas: their process ids by name."""
    return await in_thread(cluster.call, "wait", 2)


async def in_thread(function: Any, *arguments: Any) -> Any:
    """Call what blocks; do not wait for ever."""
    with trio.fail_after(DEADLINE_S):
        return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)


async def ask(port: int, path: str, body: dict[str, Any] | None = None, *headers: str) -> tuple[int, str, Any]:
    """Return status, replica and body of one answer."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request(path, body, *headers))
        status, headers, data = await read_response(stream)
    return status, headers.get("x-replica", ""), data


def request(path: str, body: dict[str, Any] | None, *headers: str) -> bytes:
    """Spell a GET, or a POST with a body."""
    if body is None:
        return http("GET", path, b"", "Connection: close")
    return http(
        "POST", path, json.dumps(body).encode(), "Content-Type: application/json", "Connection: close", *headers
    )


async def ask_replica(port: int, name: str, path: str) -> str:
    """Return what one of the replicas answers: ask until it is the one that answers."""
    while True:
        status, replica, data = await ask(port, path)
        if replica == name:
            assert status == 200, data
            return data.decode()


@attrs.define
class Reading:
    """A stream that is being read."""

    stream: trio.SocketStream
    data: bytes = b""

    async def until(self, num_tokens: int) -> None:
        """Read until so many tokens have arrived."""
        while self.data.count(b'"text":') < num_tokens:
            self.data += (part := await self.stream.receive_some())
            assert part, self.data

    async def to_end(self) -> bytes:
        """Read what is left; a connection that breaks has ended."""
        try:
            async for part in self.stream:
                self.data += part
        except trio.BrokenResourceError:
            pass
        return self.data

    @property
    def replica(self) -> str:
        head = self.data.partition(b"\r\n\r\n")[0].decode()
        return next(line.partition(": ")[2] for line in head.split("\r\n") if line.startswith("x-replica: "))


@asynccontextmanager
async def streaming(port: int, prompt: str = "What is the capital of Japan?", *headers: str) -> AsyncIterator[Reading]:
    """Stream NUM_TOKENS tokens."""
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    with trio.fail_after(DEADLINE_S):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(request("/v1/completions", body, *headers))
            yield Reading(stream)


async def sessions(port: int, replicas: dict[str, int]) -> list[str]:
    """Return a header for each replica with which requests go to it: a session that was there before."""
    found: dict[str, str] = {}
    with trio.fail_after(DEADLINE_S):
        for number in itertools.count():
            header = f"X-Session-Id: {number}"
            _, replica, _ = await ask(port, "/v1/completions", {"prompt": "One", "max_tokens": 1}, header)
            found[replica] = header
            if set(replicas) <= set(found):
                break
    return [found[replica] for replica in replicas]


@asynccontextmanager
async def on_both(cluster: Cluster, replicas: dict[str, int]) -> AsyncIterator[tuple[Reading, Reading, ExitStack]]:
    """Begin a stream on each replica. They wait until the block closes the stack, which opens the gate."""
    first, second = await sessions(cluster.port, replicas)
    with ExitStack() as gate:
        gate.enter_context(closed(cluster.gate))
        async with streaming(cluster.port, "One", first) as one, streaming(cluster.port, "Two", second) as other:
            await one.until(2)
            await other.until(2)
            assert one.replica != other.replica
            yield one, other, gate


def ended_whole(data: bytes) -> bool:
    """Return whether a stream has all its tokens and says so."""
    return b'"finish_reason":"length"' in data and b"[DONE]" in data


async def test_tokens_arrive_while_the_request_runs(cluster: Cluster, replicas: dict[str, int]) -> None:
    """The first tokens are at the client before the engine can compute the last."""
    async with streaming(cluster.port) as reading:
        with closed(cluster.gate):
            await reading.until(2)
            assert not ended_whole(reading.data)
        assert ended_whole(await reading.to_end())
        assert reading.data.count(b'"text":') >= NUM_TOKENS


async def test_a_client_that_leaves_ends_its_request_in_the_engine(cluster: Cluster, replicas: dict[str, int]) -> None:
    """The engine of the replica aborts it: nothing runs there, and no block is in use."""
    with closed(cluster.gate):
        async with streaming(cluster.port) as reading:
            await reading.until(2)
        with trio.fail_after(DEADLINE_S):
            # The replica has noticed before its engine can go on.
            while json.loads(await ask_replica(cluster.port, reading.replica, "/load")) != {"server_load": 0}:
                pass
    with trio.fail_after(DEADLINE_S):
        while 'vllm:num_requests_running{engine="0",model_name="trio-llm-demo"} 0.0' not in (
            metrics := await ask_replica(cluster.port, reading.replica, "/metrics")
        ):
            pass
    assert 'vllm:kv_cache_usage_perc{engine="0",model_name="trio-llm-demo"} 0.0' in metrics
    assert 'finished_reason="abort",model_name="trio-llm-demo"} 1.0' in metrics


async def test_a_killed_replica_loses_its_own_requests_and_is_replaced(
    cluster: Cluster, replicas: dict[str, int]
) -> None:
    """The other replica's stream goes on to its end, and there are two replicas again."""
    async with on_both(cluster, replicas) as (one, other, gate):
        with gate:
            os.kill(replicas[one.replica], signal.SIGKILL)
            assert not ended_whole(await one.to_end())
        assert ended_whole(await other.to_end())
    after = await in_thread(cluster.call, "wait", 2)
    assert one.replica not in after
    assert other.replica in after
    for name in after:
        assert '"ok"' in await ask_replica(cluster.port, name, "/health")


async def test_no_replica_has_files_and_batches(cluster: Cluster, replicas: dict[str, int]) -> None:
    """They have one owner: both replicas refuse them by name. Each answer has one request id."""
    with trio.fail_after(DEADLINE_S):
        refused: set[str] = set()
        while refused != set(replicas):
            for path in ("/v1/files", "/v1/batches"):
                status, replica, data = await ask(cluster.port, path)
                assert status == 501
                assert b"owns_batches" in data
                refused.add(replica)
        async with await trio.open_tcp_stream("127.0.0.1", cluster.port) as stream:
            await stream.send_all(request("/health", None))
            assert (await Reading(stream).to_end()).count(b"x-request-id") == 1


async def test_equal_beginnings_go_to_one_replica(cluster: Cluster, replicas: dict[str, int]) -> None:
    """Each is cached where it was computed; different ones are spread."""
    seen: set[str] = set()
    with trio.fail_after(DEADLINE_S):
        for number in range(12):
            beginning = f"Rule {number}: " + "What is the capital of Japan? " * 12
            answers = []
            for ending in ("One", "Two", "Three", "Four"):
                body = {"prompt": beginning + ending, "max_tokens": 1}
                status, replica, data = await ask(cluster.port, "/v1/completions", body)
                assert status == 200, data
                answers.append((replica, json.loads(data)["usage"]["prompt_tokens_details"]["cached_tokens"]))
            assert len({replica for replica, _ in answers}) == 1
            assert [cached > 0 for _, cached in answers] == [False, True, True, True]
            seen.add(answers[0][0])
    assert seen == set(replicas)


async def test_the_queues_of_the_engines_decide_how_many_replicas_there_are(
    cluster: Cluster, replicas: dict[str, int]
) -> None:
    """Waiting requests bring a third replica, and it goes when there is less to do. No request is lost meanwhile."""
    async with trio.open_nursery() as nursery:
        with closed(cluster.gate):
            for number in range(24):  # Two replicas run 8 of them; the others wait in the engines.
                nursery.start_soon(_stream_whole, cluster.port, f"Question {number}: what is the capital of Japan?")
            assert set(replicas) < set(await in_thread(cluster.call, "wait", 3))
    scaled_down = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_ask_until, cluster.port, scaled_down)
        assert len(await in_thread(cluster.call, "wait", 2)) == 2
        scaled_down.set()


async def test_replicas_that_are_stopped_finish_what_they_have_begun(
    cluster: Cluster, replicas: dict[str, int]
) -> None:
    """Both are told to stop in the middle of a stream: it goes on to its end. Nothing runs after this test."""
    async with on_both(cluster, replicas) as (one, other, gate):
        with gate:
            await in_thread(cluster.call, "delete", str(cluster.gate.parent))
        assert ended_whole(await one.to_end())
        assert ended_whole(await other.to_end())


async def _stream_whole(port: int, prompt: str) -> None:
    async with streaming(port, prompt) as reading:
        assert ended_whole(await reading.to_end())


async def _ask_until(port: int, event: trio.Event) -> None:
    while not event.is_set():
        await _stream_whole(port, "What is the capital of Japan?")
