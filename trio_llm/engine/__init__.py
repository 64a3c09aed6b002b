"""Floor 3: four Trio actors around the pure core and the runner, without torch and HTTP."""

from trio_llm.engine.engine import Engine, Health
from trio_llm.engine.messages import RequestStats, StepReport
from trio_llm.engine.samples import open_samples
from trio_llm.engine.stream import Delta, Stream

__all__ = ["Delta", "Engine", "Health", "RequestStats", "StepReport", "Stream", "open_samples"]
