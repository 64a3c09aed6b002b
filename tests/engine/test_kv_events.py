"""KV events, as a router hears them: over ZeroMQ, decoded by this file's own idea of vLLM's wire form."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import zmq
from prometheus_client import Counter

import trio_llm
from tests.core.loop import FULL, HYBRID, TWO_SIZES, Loop, prompt_of
from tests.engine.fakes import HashStub, open_stub
from trio_llm.config import EngineConfig
from trio_llm.core.block_manager import BlockManager
from trio_llm.engine import kv_event_publisher
from trio_llm.engine.kv_event_publisher import EventPublisher
from trio_llm.engine.kv_events import KVEvents, KVEventsConfig, hash_secret, kv_events_config
from trio_llm.engine.metrics import exposition
from trio_llm.errors import ConfigError
from trio_llm.messages import BlockAsk, BlockGrant
from trio_llm.model_info import KVGroup
from trio_llm.params import SamplingParams, Submission

Block = tuple[int, int]
"""Group and hash."""

SALTS = (b"", b"", b"", b"salt")
END = (2**64 - 1).to_bytes(8, "big")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send moves as they come."""
    monkeypatch.setattr(kv_event_publisher, "_GATHER_S", 0.0)


class Subscriber:
    """A router's picture of one worker's cache, from events alone."""

    def __init__(self, endpoint: str, replay: str | None = None) -> None:
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.rcvtimeo = 20_000
        self._sub.connect(endpoint)
        self._sub.subscribe(b"kv@")
        self._replay = self._context.socket(zmq.DEALER)
        self._replay.rcvtimeo = 20_000
        if replay is not None:
            self._replay.connect(replay)
        self.cached: dict[Block, dict[str, Any]] = {}
        self.batches: list[list[Any]] = []
        self.next_seq = 0

    def close(self) -> None:
        self._context.destroy(linger=0)

    def hear(self) -> None:
        """Take the next message in; if some are missing, ask for them first."""
        topic, number, payload = self._sub.recv_multipart()
        seq = int.from_bytes(number, "big")
        assert topic == b"kv@pod@model" and len(number) == 8
        if seq > self.next_seq:
            for again, batch in self.ask_again(self.next_seq):
                if self.next_seq <= again < seq:
                    self._take(again, batch)
        if seq >= self.next_seq:
            self._take(seq, payload)

    def ask_again(self, first: int) -> Iterator[tuple[int, bytes]]:
        self._replay.send_multipart((b"", first.to_bytes(8, "big")))
        while True:
            empty, number, batch = self._replay.recv_multipart()
            assert empty == b""
            if number == END:
                assert batch == b""
                return
            yield int.from_bytes(number, "big"), batch

    def ask(self, frames: tuple[bytes, ...]) -> None:
        self._replay.send_multipart(frames)

    def hears(self) -> bool:
        return bool(self._sub.poll(20))

    def miss(self) -> None:
        """Lose the next message."""
        self._sub.recv_multipart()

    def replay(self) -> None:
        """Take in all batches that are kept."""
        for seq, batch in self.ask_again(self.next_seq):
            self._take(seq, batch)

    def _take(self, seq: int, payload: bytes) -> None:
        assert seq == self.next_seq
        self.next_seq += 1
        batch = msgspec.msgpack.decode(payload)
        self.batches.append(batch)
        ts, events, rank = batch
        assert isinstance(ts, float) and rank == 0
        for event in events:
            self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "AllBlocksCleared":
            self.cached.clear()
        elif kind == "BlockRemoved":
            assert event.keys() == {"type", "block_hashes", "medium", "group_idx"}
            for value in event["block_hashes"]:
                del self.cached[event["group_idx"], value]
        else:
            assert kind == "BlockStored"
            size, parent = event["block_size"], event["parent_block_hash"]
            hashes, keys = event["block_hashes"], event["extra_keys"]
            assert len(event["token_ids"]) == size * len(hashes) and len(keys) == len(hashes)
            assert (event["lora_id"], event["lora_name"], event["medium"]) == (None, None, "GPU")
            for at, (value, extra) in enumerate(zip(hashes, keys, strict=True)):
                tokens = tuple(event["token_ids"][at * size : (at + 1) * size])
                assert (event["group_idx"], value) not in self.cached
                assert extra is None or parent is None
                about = {"tokens": tokens, "parent": parent, "extra": extra, **event}
                self.cached[event["group_idx"], value] = about
                parent = value

    def prefix(self, block: Block) -> tuple[bytes | None, tuple[int, ...]]:
        """Return the salt of a block's sequence and the tokens up to its end; None and () if blocks are missing."""
        about = self.cached.get(block)
        if about is None:
            return None, ()
        if about["parent"] is None:
            return bytes.fromhex((about["extra"] or [""])[0]), about["tokens"]
        salt, before = self.prefix((block[0], about["parent"]))
        return salt, () if salt is None else (*before, *about["tokens"])


class Line:
    """A block manager, the publisher of its moves, and a subscriber that is there from the start."""

    def __init__(self, blocks: BlockManager, path: Path, **config: Any) -> None:
        events, replay = f"ipc://{path}/events", f"ipc://{path}/replay"
        wanted = KVEventsConfig(True, endpoint=events, replay_endpoint=replay, topic="kv@pod@model", **config)
        self.published, self.dropped = (Counter(name, "", registry=None) for name in ("published", "dropped"))
        self.blocks = blocks
        self.publisher = EventPublisher(wanted, blocks.groups, self.published)
        self.subscriber = Subscriber(events, replay)
        self.num_put = 0
        self._put = self.publisher.put
        self.publisher.put = self._count
        # A subscription needs a while to arrive.
        while not self.subscriber.hears():
            self.publisher.put(0.0, [])
        self.catch_up()
        self.events = KVEvents(blocks, self.publisher, self.dropped)

    def _count(self, *args: Any, **kwargs: Any) -> bool:
        taken = self._put(*args, **kwargs)
        self.num_put += taken
        return taken

    def step(self, ask: BlockAsk, grant: BlockGrant) -> None:
        """Publish what a step moved."""
        self.events.planned(0.0, None, ask, grant, None)

    def catch_up(self) -> None:
        """Let the subscriber hear all that was published."""
        while self.subscriber.next_seq < self.num_put:
            self.subscriber.hear()

    def close(self) -> None:
        self.subscriber.close()
        self.publisher.close()


@contextmanager
def publishing(blocks: BlockManager, path: Path, **config: Any) -> Iterator[Line]:
    """Publish a manager's moves until the block ends."""
    line = Line(blocks, path, **config)
    try:
        yield line
    finally:
        line.close()


def truth(blocks: BlockManager) -> set[Block]:
    """Return what the block manager has in its prefix cache."""
    return {
        (group, int.from_bytes(digest[-8:], "big"))
        for group, cached in enumerate(blocks._pool._cached)
        for digest in cached
    }


def after_each_step(loop: Loop, check: Callable[[BlockAsk, BlockGrant], None]) -> None:
    """Call `check` after each call of the loop's block manager."""
    reserve = loop.blocks.reserve

    def checked(ask: BlockAsk) -> BlockGrant:
        grant = reserve(ask)
        check(ask, grant)
        return grant

    loop.blocks.reserve = checked


def live(loop: Loop, rng: random.Random, num_requests: int = 25) -> None:
    """Serve prompts that begin alike, some salted; clients leave and rows fail."""
    for _ in range(num_requests):
        prompt = (*prompt_of(rng.randrange(1, 20), rng.randrange(2)), *prompt_of(rng.randrange(1, 9), rng.randrange(4)))
        request_id = loop.submit(prompt, SamplingParams(max_tokens=rng.randrange(1, 12)), salt=rng.choice(SALTS))
        for _ in range(rng.randrange(3)):
            loop.step(failed=[request_id] if rng.random() < 0.1 else [])
        if rng.random() < 0.1:
            loop.abort(request_id)
    loop.run()


@pytest.mark.parametrize(("groups", "num_blocks"), [(FULL, 14), (HYBRID, 26), (TWO_SIZES, 28)])
def test_a_subscriber_knows_the_cache_after_each_step(
    groups: tuple[KVGroup, ...], num_blocks: int, tmp_path: Path
) -> None:
    """The events make the same set of cached blocks, through hits, evictions, preemptions, failures and salts."""
    loop = Loop(groups, num_blocks=num_blocks, max_model_len=40)
    with publishing(loop.blocks, tmp_path) as line:

        def check(ask: BlockAsk, grant: BlockGrant) -> None:
            line.step(ask, grant)
            line.catch_up()
            assert line.subscriber.cached.keys() == truth(loop.blocks)

        after_each_step(loop, check)
        live(loop, random.Random(2))
    subscriber = line.subscriber
    assert line.published._value.get() == line.num_put == subscriber.next_seq
    kinds = {event["type"] for _, events, _ in subscriber.batches for event in events}
    assert kinds == {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
    assert any(grant.preempted for grant in loop.grants) and sum(client.hit or 0 for client in loop.clients.values())
    sequences = [(client.salt, client.prompt + tuple(client.output)) for client in loop.clients.values()]
    for (group, value), about in subscriber.cached.items():
        assert about["kv_cache_spec_kind"] == ("sliding_window" if groups[group].window else "full_attention")
        assert about.get("kv_cache_spec_sliding_window") == groups[group].window
        assert about["block_size"] == groups[group].block_size
        salt, tokens = subscriber.prefix((group, value))
        if groups[group].window is None and salt is not None:
            assert any(whole[: len(tokens)] == tokens for own, whole in sequences if own == salt)


def test_missed_batches_are_sent_again(tmp_path: Path) -> None:
    """A subscriber that missed messages asks for them, and one that comes late asks for all; both know the same."""
    loop = Loop(num_blocks=14, max_model_len=40)
    rng = random.Random(3)
    with publishing(loop.blocks, tmp_path) as line:

        def check(ask: BlockAsk, grant: BlockGrant) -> None:
            before = line.num_put
            line.step(ask, grant)
            if line.num_put > before and rng.random() < 0.4:
                line.subscriber.miss()

        after_each_step(loop, check)
        live(loop, rng)
        line.publisher.put(0.0, [])
        line.catch_up()
        assert line.subscriber.cached.keys() == truth(loop.blocks)
        late = Subscriber(f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay")
        late.replay()
        late.close()
        assert late.cached == line.subscriber.cached
        assert late.next_seq == line.num_put


def test_only_the_last_batches_are_kept(tmp_path: Path) -> None:
    """Who asks for more than `buffer_steps` batches gets these and the end; nonsense gets nothing and harms nobody."""
    loop = Loop(num_blocks=14, max_model_len=40)
    with publishing(loop.blocks, tmp_path, buffer_steps=3) as line:
        for _ in range(5):
            line.publisher.put(0.0, [])
        line.catch_up()
        for frames in ((b"x",), (b"", b"", b""), (b"", b"9" * 1000)):
            line.subscriber.ask(frames)
        other = Subscriber(f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay")
        assert [seq for seq, _ in other.ask_again(0)] == [line.num_put - 3, line.num_put - 2, line.num_put - 1]
        assert list(other.ask_again(line.num_put)) == []
        other.close()


def test_a_slow_publisher_drops_steps_and_then_tells_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step waits. What was lost is counted, and the whole cache follows once there is room."""
    may_send = threading.Event()
    events_of = kv_event_publisher.events_of
    # Before each step, not before all that are queued: the thread may be among them when it is stopped.
    monkeypatch.setattr(kv_event_publisher, "events_of", lambda *step: may_send.wait(60) and events_of(*step))
    may_send.set()
    loop = Loop(num_blocks=14, max_model_len=40)
    with publishing(loop.blocks, tmp_path, max_queue_size=4) as line:
        after_each_step(loop, line.step)
        may_send.clear()
        live(loop, random.Random(4), 10)
        assert line.dropped._value.get() > 3
        may_send.set()
        line.catch_up()
        assert line.subscriber.cached.keys() != truth(loop.blocks)
        live(loop, random.Random(5), 1)
        line.catch_up()
        assert line.subscriber.cached.keys() == truth(loop.blocks)
        assert line.subscriber.cached


def busy_config(path: Path) -> str:
    """Return settings that publish below a directory."""
    sockets = {"endpoint": f"ipc://{path}/events", "replay_endpoint": f"ipc://{path}/replay"}
    return json.dumps({"enable_kv_cache_events": True, "topic": "kv@pod@model", **sockets})


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_an_engine_publishes(tmp_path: Path, asynchronous: bool) -> None:
    """A router that reads the events knows which part of a prompt the engine will find in its cache."""
    prompt = [*range(40), 7]
    config = busy_config(tmp_path)
    async with open_stub(HashStub(), kv_events_config=config, async_scheduling=asynchronous) as engine:
        submission = Submission(prompt, SamplingParams(max_tokens=9))
        async with engine.open_stream(submission) as stream:
            await stream.collect()
        async with engine.open_stream(submission) as stream:
            await stream.collect()
        await engine.wait_idle()
        subscriber = Subscriber(f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay")
        await trio.to_thread.run_sync(subscriber.replay)
        subscriber.close()
        blocks = engine._history._blocks
        assert subscriber.cached.keys() == truth(blocks)
        known = [subscriber.prefix(block)[1] for block in subscriber.cached]
        assert stream.cached_tokens == max(len(one) for one in known if tuple(prompt[: len(one)]) == one) == 32
        labels = {"model_name": "stub", "engine": "0"}
        batches = engine.registry.get_sample_value("trio_llm:kv_event_batches_total", labels)
        assert batches == subscriber.next_seq


async def test_without_the_setting_nothing_is_kept() -> None:
    """No thread, no list of moves, no series."""
    async with open_stub(HashStub()) as engine:
        async with engine.open_stream(Submission(range(40), SamplingParams(max_tokens=9))) as stream:
            await stream.collect()
        assert truth(engine._history._blocks)
        assert engine._history._blocks._pool.moves is None
        assert "trio-llm-kv-events" not in {thread.name for thread in threading.enumerate()}
        assert b"kv_event" not in exposition(engine.registry)


def test_an_endpoint_without_a_wildcard_is_connected_to() -> None:
    """As in vLLM, a worker can call a router that listens."""
    context = zmq.Context()
    router = context.socket(zmq.SUB)
    router.rcvtimeo = 20_000
    router.subscribe(b"")
    port = router.bind_to_random_port("tcp://127.0.0.1")
    config = KVEventsConfig(True, endpoint=f"tcp://127.0.0.1:{port}")
    publisher = EventPublisher(config, FULL, Counter("published", "", registry=None))
    while not router.poll(20):
        publisher.put(1.5, [], anew=True)
    topic, _, payload = router.recv_multipart()
    assert (topic, msgspec.msgpack.decode(payload)) == (b"", [1.5, [{"type": "AllBlocksCleared"}], 0])
    publisher.close()
    context.destroy(linger=0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        ('{"enable_kv_cache_events": 1}', "Expected `bool`, got `int` - at `$.enable_kv_cache_events`"),
        ('{"endpint": "tcp://*:5557"}', "unknown field `endpint`"),
        ('{"publisher": "nats"}', "Invalid enum value 'nats' - at `$.publisher`"),
        ('{"buffer_steps": 0}', "Expected `int` >= 1 - at `$.buffer_steps`"),
        ('{"enable_kv_cache_events": true, "endpoint": "tcp://*:x"}', "tcp://*:x: Invalid argument"),
        ('{"enable_kv_cache_events": true, "replay_endpoint": "tcp://127.0.0.1:%d"}', "Address already in use"),
    ],
)
async def test_what_cannot_be_used_is_one_line(config: str, says: str) -> None:
    """The error names the setting, its value and what is wrong in it."""
    taken = socket.create_server(("127.0.0.1", 0))
    config = config.replace("%d", str(taken.getsockname()[1])).replace(": true}", ": true}")
    if "endpoint" not in config.replace("replay_endpoint", ""):
        config = config.replace(': true, "replay', ': true, "endpoint": "inproc://events", "replay')
    with pytest.raises(ConfigError, match="kv_events_config") as refusal:
        async with open_stub(kv_events_config=config):
            pass
    assert says in str(refusal.value) and "\n" not in str(refusal.value)
    taken.close()


async def test_events_need_a_cache_and_pyzmq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are refused by name, and what is switched off needs neither."""
    config = busy_config(tmp_path)
    with pytest.raises(ConfigError, match="needs the prefix cache"):
        kv_events_config(EngineConfig(kv_events_config=config, enable_prefix_caching=False))
    for off in ('{"enable_kv_cache_events": false}', '{"enable_kv_cache_events": true, "publisher": "null"}'):
        assert kv_events_config(EngineConfig(kv_events_config=off, enable_prefix_caching=False)) is None
    monkeypatch.setitem(sys.modules, "trio_llm.engine.kv_event_publisher", None)
    with pytest.raises(ConfigError, match=r"pip install 'trio-llm\[events\]'"):
        async with open_stub(kv_events_config=config):
            pass


_HASHES = """
import os
from trio_llm.cli.settings import load_settings
from trio_llm.core.prefix import Chain
from trio_llm.engine.kv_events import hash_secret

config = load_settings(None, os.environ, {}).config.engine
print(Chain(hash_secret(config), b"", range(32), 16).block(1, 16)[0].hex())
"""


def test_processes_with_one_seed_have_equal_hashes(tmp_path: Path) -> None:
    """PYTHONHASHSEED is the seed, as in vLLM: a restarted worker names its blocks as before. Without it, none does."""

    def hash_of(seed: str | None) -> str:
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
        environ |= {"PYTHONPATH": str(Path(trio_llm.__file__).parents[1])} | ({"PYTHONHASHSEED": seed} if seed else {})
        command = [sys.executable, "-c", _HASHES]
        return subprocess.run(command, env=environ, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    hashes = [hash_of(seed) for seed in ("42", "42", None)]
    assert hashes[0] == hashes[1] != hashes[2]
    secrets = [hash_secret(EngineConfig(prefix_hash_seed=seed)) for seed in ("random", "random", "1", "2")]
    assert len(set(secrets)) == 4
