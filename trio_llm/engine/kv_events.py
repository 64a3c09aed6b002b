"""Publishes what enters and leaves the prefix cache, so that routers know which worker has which prefix.

The scheduler actor only appends to a queue; the publisher's thread encodes and sends. If that falls behind, steps are
dropped and counted. Then the whole cache is published anew, so that a subscriber's picture of it is right again.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta, Struct
from prometheus_client import CollectorRegistry, Counter

from trio_llm.config import EngineConfig
from trio_llm.core.block_manager import BlockManager
from trio_llm.core.block_pool import Removed, Stored
from trio_llm.engine.messages import RequestStats
from trio_llm.errors import ConfigError
from trio_llm.messages import BlockAsk, BlockGrant, Commit, FinishReason, StepPlan, StepResult
from trio_llm.model_info import ModelInfo
from trio_llm.params import Submission

if TYPE_CHECKING:  # pyzmq is optional.
    from trio_llm.engine.kv_event_publisher import EventPublisher

_Count = Annotated[int, Meta(ge=1, le=10_000_000)]


class KVEventsConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The value of --kv-events-config, as vLLM has it.

    Attributes:
        publisher: "null" publishes nothing. Default: "zmq".
        endpoint: Where batches are published. Bound if it has a `*` or `::`, or is of ipc or inproc, else connected to.
        replay_endpoint: Where the last batches can be asked for again; bound. None for no such socket.
        buffer_steps: Number of batches that are kept for it.
        hwm: Number of batches that wait for one slow subscriber. Further ones are lost to it.
        max_queue_size: Number of steps that wait to be published.
        topic: First frame of every message.
    """

    enable_kv_cache_events: bool = False
    publisher: Literal["zmq", "null"] | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: _Count = 10_000
    hwm: _Count = 100_000
    max_queue_size: _Count = 100_000
    topic: str = ""


def kv_events_config(config: EngineConfig) -> KVEventsConfig | None:
    """Return where KV events go; None if they are off.

    Raises:
        ConfigError: The setting is no such JSON, or there is no prefix cache to tell of.
    """
    if config.kv_events_config is None:
        return None
    try:
        parsed = msgspec.json.decode(config.kv_events_config, type=KVEventsConfig)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise _refused(config, f"must be JSON as for vLLM: {error}") from None
    if not parsed.enable_kv_cache_events or parsed.publisher == "null":
        return None
    if not config.enable_prefix_caching:
        raise _refused(config, "needs the prefix cache; remove --no-enable-prefix-caching")
    return parsed


def _refused(config: EngineConfig, allowed: str) -> ConfigError:
    return ConfigError("kv_events_config", config.kv_events_config, "engine", allowed)


def hash_secret(config: EngineConfig) -> bytes:
    """Return the key of the prefix digests: new in each process, or always the same for one seed."""
    seed = config.prefix_hash_seed
    if seed is None or seed == "random":
        return secrets.token_bytes(32)
    return hashlib.sha256(seed.encode()).digest()


class KVEvents:
    """A `CoreWatcher` that publishes moves; see `open_kv_events`."""

    def __init__(self, blocks: BlockManager, publisher: EventPublisher, dropped: Counter) -> None:
        self._blocks, self._publisher, self._dropped = blocks, publisher, dropped
        self._cached: dict[tuple[int, bytes], Stored] = {}
        # A subscriber that knew an earlier process of this address must forget it.
        self._anew = True
        blocks.watch()

    def planned(
        self,
        at_s: float,  # noqa: ARG002 - the interface has it, like the others
        prompt_tokens: int | None,  # noqa: ARG002
        ask: BlockAsk,  # noqa: ARG002
        grant: BlockGrant,  # noqa: ARG002
        plan: StepPlan | None,  # noqa: ARG002
    ) -> None:
        moves = self._blocks.take_moves()
        for move in moves:
            if isinstance(move, Removed):
                del self._cached[move.group, move.digest]
            else:
                self._cached[move.group, move.digest] = move
        if self._anew and self._publisher.has_room:
            self._anew = False
            self._publisher.put(time.time(), list(self._cached.values()), anew=True)
        elif moves and (self._anew or not self._publisher.put(time.time(), moves)):
            self._anew = True
            self._dropped.inc()

    def arrived(self, request_id: int, submission: Submission, at_s: float) -> None:
        pass

    def left(self, request_id: int, reason: FinishReason, at_s: float) -> None:
        pass

    def committed(self, at_s: float, result: StepResult, commit: Commit) -> None:
        pass

    def ended(self, stats: RequestStats) -> None:
        pass


@contextmanager
def open_kv_events(
    config: EngineConfig, info: ModelInfo, blocks: BlockManager, registry: CollectorRegistry
) -> Generator[KVEvents | None, None, None]:
    """Publish until the block ends; None if the settings do not ask for it.

    Raises:
        ConfigError: pyzmq is not installed, or an endpoint cannot be used.
    """
    if (wanted := kv_events_config(config)) is None:
        yield None
        return
    try:
        from trio_llm.engine.kv_event_publisher import EventPublisher, ZMQError
    except ImportError:
        raise _refused(config, "needs pyzmq: pip install 'trio-llm[events]'") from None
    labels = {"model_name": info.name, "engine": "0"}

    def counter(name: str, meaning: str) -> Counter:
        return Counter(f"trio_llm:kv_event_{name}", meaning, [*labels], registry=registry).labels(**labels)

    published = counter("batches", "Batches of KV events published.")
    dropped = counter("dropped_steps", "Steps whose KV events were dropped, because publishing was too slow.")
    try:
        publisher = EventPublisher(wanted, blocks.groups, published)
    except ZMQError as error:
        raise _refused(config, f"the endpoint cannot be used: {error}") from None
    try:
        yield KVEvents(blocks, publisher, dropped)
    finally:
        publisher.close()
