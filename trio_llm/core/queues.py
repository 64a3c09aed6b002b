"""The running, waiting and held sequences, in policy order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import attrgetter

from trio_llm.core.sequence import Sequence, Status

_by_key = attrgetter("key")
_by_waiting_key = attrgetter("waiting_key")


class Queues:
    """The live sequences. A sequence is in `running`, in `waiting`, or held in its leader's list of followers.

    Attributes:
        running: In policy order; the last one is preempted first.
        waiting: In the order of admission.
        num_held: Sequences that wait for their leader's prompt and do not block others.
    """

    def __init__(self) -> None:
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_held = 0
        self._live: dict[int, Sequence] = {}

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._live

    def get(self, request_id: int) -> Sequence | None:
        return self._live.get(request_id)

    def find(self, request_ids: Iterable[int]) -> list[Sequence | None]:
        """Return the sequences with these ids, None for those that ended. Faster than one call per id."""
        return list(map(self._live.get, request_ids))

    def add(self, sequence: Sequence, leader: int | None) -> None:
        """Queue a new sequence; hold it while its leader's prompt is not computed."""
        ahead = None if leader is None else self._live.get(leader)
        self._live[sequence.request_id] = sequence
        if ahead is not None and not ahead.prompt_computed:
            sequence.status = Status.HELD
            ahead.followers.append(sequence)
            self.num_held += 1
        else:
            insort(self.waiting, sequence, key=_by_waiting_key)

    def start(self, sequence: Sequence) -> None:
        """Move a sequence from the waiting to the running ones."""
        self._remove_waiting(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_by_key)

    def preempt(self, sequence: Sequence) -> None:
        """Move a running sequence to the front of the waiting sequences of its priority, to be recomputed."""
        self._remove_running(sequence)
        again = sequence.restart()
        self._live[again.request_id] = again
        insort(self.waiting, again, key=_by_waiting_key)

    def remove(self, sequence: Sequence) -> None:
        """Remove an ended sequence, whatever its state."""
        del self._live[sequence.request_id]
        if sequence.status is Status.RUNNING:
            self._remove_running(sequence)
        elif sequence.status is Status.WAITING:
            self._remove_waiting(sequence)
        else:
            self.num_held -= 1
        sequence.status = Status.ENDED
        self.free_followers(sequence)

    def free_followers(self, leader: Sequence) -> None:
        """Move the followers of this sequence to the waiting sequences."""
        for follower in leader.followers:
            if follower.status is Status.HELD:
                follower.status = Status.WAITING
                self.num_held -= 1
                insort(self.waiting, follower, key=_by_waiting_key)
        leader.followers = []

    def _remove_running(self, sequence: Sequence) -> None:
        del self.running[bisect_left(self.running, sequence.key, key=_by_key)]

    def _remove_waiting(self, sequence: Sequence) -> None:
        del self.waiting[bisect_left(self.waiting, sequence.waiting_key, key=_by_waiting_key)]
