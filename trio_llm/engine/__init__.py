"""Floor 3: the pure core and the runner, carried by four Trio actors (no torch, no HTTP)."""

from trio_llm.engine.engine import Engine, Health
from trio_llm.engine.messages import RequestStats, StepReport
from trio_llm.engine.samples import open_samples
from trio_llm.engine.stream import Delta, Stream

__all__ = ["Delta", "Engine", "Health", "RequestStats", "StepReport", "Stream", "open_samples"]
