"""Opens records of a server's steps (floor 1): the real scheduler and block manager at any step, without a model."""

from trio_llm.replay.replay import Replay

__all__ = ["Replay"]
