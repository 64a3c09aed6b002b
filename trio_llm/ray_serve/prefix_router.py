"""Requests that begin alike go to one replica, as long as it has not much more to do than another."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

MAX_IMBALANCE = 8
"""Requests that a replica may have more than the least busy one and still get those that begin alike. A guess."""
_MAX_REMEMBERED = 100_000


class PrefixRouter(RequestRouter):
    """Chooses by the longest beginning that was routed before; else by a hash of the beginning, else by load.

    Every proxy of a cluster has its own router. By the hash they agree on a beginning that none of them knows.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        self._max_imbalance: int = kwargs.get("max_imbalance", MAX_IMBALANCE)
        # Where the beginning with this key was routed last; the least recent ones are forgotten.
        self._routed: OrderedDict[str, ReplicaID] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the preferred replica, then all of them; Ray takes the least busy one of a list that is not full."""
        in_any_order = random.sample(candidate_replicas, len(candidate_replicas))  # Ray takes the first of equal ones.
        if pending_request is None:
            return [in_any_order]
        pending_request.routing_context.should_backoff = True  # If all are full.
        preferred = self._preferred(_keys(pending_request), candidate_replicas)
        if preferred is None or self._is_busy(preferred, candidate_replicas):
            return [in_any_order]
        return [[preferred], in_any_order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:  # noqa: ARG002 - Ray calls it so
        """Remember where a request went."""
        for key in _keys(pending_request):
            self._routed[key] = replica_id
            self._routed.move_to_end(key)
        while len(self._routed) > _MAX_REMEMBERED:
            self._routed.popitem(last=False)

    def _preferred(self, keys: Sequence[str], replicas: Sequence[RunningReplica]) -> RunningReplica | None:
        if not keys or not replicas:
            return None
        by_id = {replica.replica_id: replica for replica in replicas}
        for key in reversed(keys):
            if key in self._routed and (replica := by_id.get(self._routed[key])) is not None:
                return replica
        return max(replicas, key=lambda replica: _weight(keys[0], replica.replica_id.unique_id))

    def _is_busy(self, preferred: RunningReplica, replicas: Sequence[RunningReplica]) -> bool:
        lengths = self.replica_queue_len_cache
        least = min(lengths.get(replica.replica_id) or 0 for replica in replicas)
        return (lengths.get(preferred.replica_id) or 0) - least > self._max_imbalance


def _keys(request: PendingRequest) -> list[str]:
    return [key for key in request.metadata.session_id.split(",") if key]


def _weight(key: str, replica: str) -> bytes:
    """Return the weight of a replica for a key: the largest wins (rendezvous hashing)."""
    return blake2b(f"{key}/{replica}".encode(), digest_size=8).digest()
