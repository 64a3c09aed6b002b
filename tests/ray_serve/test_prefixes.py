"""How the beginning of a request gets to the router, and what that makes of it. No cluster here."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from trio_llm.ray_serve.prefix_header import CHUNK_BYTES, MAX_CHUNKS, PrefixHeader, prefix_keys

SYSTEM = "You answer in one word. " * 40


def chat(*contents: str, **fields: Any) -> bytes:
    """Spell a chat request as clients do."""
    messages = [{"role": "user", "content": text} for text in contents]
    return json.dumps({"model": "any", **fields, "messages": messages, "stream": True}).encode()


def test_equal_beginnings_have_equal_keys() -> None:
    """Whatever stands before and after the prompt; where two prompts differ, so do all keys from there on."""
    one, other = prefix_keys(chat(SYSTEM, "a" + "x" * 900)), prefix_keys(chat(SYSTEM, "b" + "x" * 900, temperature=1))
    same = [left == right for left, right in zip(one, other, strict=True)]
    assert same == sorted(same, reverse=True)
    assert (sum(same), len(same)) == (len(SYSTEM) // CHUNK_BYTES, len(one))


def test_a_longer_conversation_begins_with_the_keys_of_the_shorter() -> None:
    """The next turn of a conversation goes where the last one was computed."""
    shorter, longer = prefix_keys(chat(SYSTEM)), prefix_keys(chat(SYSTEM, "And then?" * 100))
    assert shorter
    assert longer[: len(shorter)] == shorter


@pytest.mark.parametrize("body", [b"", b"{}", chat("short"), b"\0" * 1000, b'{"model": "messages"}'])
def test_without_a_whole_chunk_there_is_no_key(body: bytes) -> None:
    """A prompt that is shorter than a chunk is cheap to compute anywhere."""
    assert prefix_keys(body) == []


def test_keys_are_bounded() -> None:
    """The header stays small, however long the prompt is."""
    assert len(prefix_keys(chat("x" * 1_000_000))) == MAX_CHUNKS


async def pass_through(
    parts: list[bytes], path: str = "/v1/chat/completions", *headers: tuple[bytes, bytes]
) -> tuple[list[tuple[bytes, bytes]], bytes, int]:
    """Send a request through the middleware: its headers and body behind it, and the parts read before that."""
    waiting, seen = list(parts), []

    async def receive() -> Any:
        body = waiting.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(waiting)}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        num_read = len(parts) - len(waiting)
        body = b""
        while (message := await receive())["more_body"]:
            body += message["body"]
        seen.append((scope["headers"], body + message["body"], num_read))

    async def send(message: Any) -> None:
        pytest.fail("the middleware answers nothing")

    await PrefixHeader(app)({"type": "http", "method": "POST", "path": path, "headers": [*headers]}, receive, send)
    return seen[0]


@pytest.mark.parametrize("size", [1, 100, 100_000])
async def test_the_body_passes_unchanged(size: int) -> None:
    """In parts of any size; no more of it is read than the keys need."""
    body = chat(SYSTEM * 40)
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    headers, passed, num_read = await pass_through(parts)
    assert passed == body
    assert headers == [(b"x-session-id", ",".join(prefix_keys(body)).encode())]
    assert num_read * size < (MAX_CHUNKS + 1) * CHUNK_BYTES + size


@pytest.mark.parametrize("path", ["/v1/files", "/v1/models"])
async def test_other_endpoints_are_left_alone(path: str) -> None:
    """An upload is not read before it is routed."""
    assert await pass_through([chat(SYSTEM)], path) == ([], chat(SYSTEM), 0)


async def test_a_session_of_the_clients_own_is_kept() -> None:
    """Who names a session knows better what belongs together."""
    own = (b"X-Session-Id", b"mine")
    assert (await pass_through([chat(SYSTEM)], "/v1/completions", own))[0] == [own]


class FakeReplica:
    """As much of Ray's as a router looks at."""

    def __init__(self, name: str) -> None:
        from ray.serve._private.common import DeploymentID, ReplicaID

        self.replica_id = ReplicaID(name, DeploymentID("trio-llm", "test"))


class Routing:
    """A router that Ray has not started, with two replicas."""

    def __init__(self) -> None:
        from ray.serve._private.request_router.common import ReplicaQueueLengthCache

        from trio_llm.ray_serve.prefix_router import PrefixRouter

        self.router = PrefixRouter.__new__(PrefixRouter)
        self.router._replica_queue_len_cache = ReplicaQueueLengthCache()
        self.router.initialize_state(max_imbalance=2)
        self.replicas: list[Any] = [FakeReplica("one"), FakeReplica("two")]

    def request(self, session: str) -> Any:
        from ray.serve._private.common import RequestMetadata
        from ray.serve._private.request_router.common import PendingRequest

        return PendingRequest([], {}, RequestMetadata("", "", session_id=session), future=None)  # pyright: ignore[reportArgumentType]

    async def choose(self, session: str) -> str | None:
        """Return the name of the preferred replica, and None for none. All others follow it."""
        *preferred, everyone = await self.router.choose_replicas(self.replicas, self.request(session))
        assert set(everyone) == set(self.replicas)
        return preferred[0][0].replica_id.unique_id if preferred else None

    def route(self, session: str, index: int) -> None:
        self.router.on_request_routed(self.request(session), self.replicas[index].replica_id, None)

    def load(self, index: int, count: int) -> None:
        self.router.replica_queue_len_cache.update(self.replicas[index].replica_id, count)


@pytest.fixture
def routing() -> Routing:
    """Nothing has been routed."""
    return Routing()


# Of Ray's own module, while it is imported.
pydantic = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")


@pydantic
@pytest.mark.ray
async def test_the_longest_known_beginning_decides(routing: Routing) -> None:
    """A conversation stays where it is, though another with the same beginning went elsewhere."""
    routing.route("a,b,c", 0)
    routing.route("a,d", 1)
    assert await routing.choose("a,b,c,e") == "one"
    assert await routing.choose("a,d,f") == "two"
    assert await routing.choose("a,x") == "two"


@pydantic
@pytest.mark.ray
async def test_routers_agree_on_what_none_of_them_knows(routing: Routing) -> None:
    """Proxies of several machines send a new beginning to one replica, and different ones to different replicas."""
    chosen = [await routing.choose(f"{number},x") for number in range(32)]
    assert chosen == [await Routing().choose(f"{number},y") for number in range(32)]
    assert set(chosen) == {"one", "two"}


@pydantic
@pytest.mark.ray
async def test_a_busy_replica_loses_its_preference(routing: Routing) -> None:
    """Above the bound, the load decides; at the bound, it does not."""
    routing.route("a", 0)
    routing.load(1, 1)
    routing.load(0, 3)
    assert await routing.choose("a") == "one"
    routing.load(0, 4)
    assert await routing.choose("a") is None


@pydantic
@pytest.mark.ray
async def test_a_replica_that_is_gone_is_forgotten(routing: Routing) -> None:
    """Its beginnings are new to the others; a request without any has no preference."""
    routing.route("a", 0)
    del routing.replicas[0]
    assert await routing.choose("a") == "two"
    assert await routing.choose("") is None


class FakeContext:
    """As much of Ray's AutoscalingContext as the policy looks at."""

    def __init__(self, loads: dict[str, float] | None, queued: float) -> None:
        self.config = SimpleNamespace(target_ongoing_requests=4)
        self.aggregated_metrics = None if loads is None else {"trio_llm_requests": loads}
        self.total_queued_requests = queued


@pytest.mark.parametrize(
    ("loads", "queued", "desired"), [({"one": 6, "two": 4}, 2, 3), ({"one": 1, "two": 0}, 0, 0.25), (None, 0, 0)]
)
def test_the_policy_divides_what_there_is_to_do(loads: dict[str, float] | None, queued: float, desired: float) -> None:
    """What runs and waits in all engines and proxies, by what one replica is to have."""
    from trio_llm.ray_serve.autoscaling import engine_queue_policy

    assert engine_queue_policy(FakeContext(loads, queued)) == (desired, {})


@pydantic
@pytest.mark.ray
def test_the_command_line_can_build_the_application() -> None:
    """`serve run` passes texts to a function of one argument."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from trio_llm.ray_serve.app import build

    call_user_app_builder_with_args_if_necessary(build, {"num_replicas": "2", "max_replicas": "4"})  # pyright: ignore[reportArgumentType]
