"""How long a step takes, as a function of its plan: fitted from the steps of a record."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import attrs

from trio_llm.messages import StepPlan


@attrs.frozen
class CostModel:
    """Seconds of a step: a constant, and so much per prompt token, per decode, and per position that decodes read.

    Attributes:
        error: Median of |modelled - recorded| / recorded over the steps that it was fitted from.
    """

    step_s: float
    prompt_token_s: float
    decode_s: float
    position_s: float
    error: float

    def seconds(self, plan: StepPlan) -> float:
        """Return the modelled time of a plan."""
        per_unit = (self.step_s, self.prompt_token_s, self.decode_s, self.position_s)
        return sum(number * seconds for number, seconds in zip(_features(plan), per_unit, strict=True))

    @classmethod
    def fit(cls, steps: Sequence[tuple[StepPlan, float]]) -> CostModel:
        """Fit the model by least squares; no part of the cost is negative."""
        import numpy as np

        features = np.array([_features(plan) for plan, _ in steps], dtype=float)
        seconds = np.array([spent for _, spent in steps], dtype=float)
        kept = list(range(features.shape[1]))
        while True:
            found, *_ = np.linalg.lstsq(features[:, kept], seconds, rcond=None)
            negative = [at for at, value in zip(kept, found, strict=True) if value < 0]
            if not negative or len(kept) == 1:
                break
            kept = [at for at in kept if at not in negative] or [0]
        values = dict(zip(kept, map(float, found), strict=True))
        fitted = [max(0.0, values.get(at, 0.0)) for at in range(features.shape[1])]
        modelled = features @ np.array(fitted)
        errors = [abs(m - s) / s for m, s in zip(modelled.tolist(), seconds.tolist(), strict=True) if s > 0]
        return cls(*fitted, error=median(errors) if errors else 0.0)


def _features(plan: StepPlan) -> tuple[float, float, float, float]:
    """Return 1, the prompt tokens, the decoded tokens with their drafts, and the positions that these read."""
    drafts = plan.drafts or (0,) * len(plan.counts)
    prompt = decodes = positions = 0
    for start, count, num_drafts in zip(plan.starts, plan.counts, drafts, strict=True):
        if count - num_drafts == 1 and start:
            decodes += count
            positions += start
        else:
            prompt += count
    return 1.0, prompt, decodes, positions
