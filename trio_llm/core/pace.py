"""How many prompt tokens a step computes, so that it takes about as long as it should.

A GPU computes 2,048 tokens in milliseconds, a CPU in seconds. Such a step stalls every stream, and when many prompts
come at once the first answer begins with the last. Knows plans and seconds, nothing of sequences or settings.
"""

from __future__ import annotations

import attrs

from trio_llm.messages import StepPlan

# Prompt tokens of a step before anything is measured, and the minimum: below, most of a step's time goes to reading the
# weights, whatever the number of tokens. Both are guesses.
_FIRST_TOKENS, _MIN_TOKENS = 32, 32


@attrs.define
class StepPace:
    """Adapts the prompt tokens of a step to the measured speed.

    Attributes:
        target_s: Duration of a step that computes as many prompt tokens as it may.
        prompt_tokens: Prompt tokens that are expected to take that long in a step, together with its decodes.
    """

    target_s: float
    prompt_tokens: int = _FIRST_TOKENS

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Adjust to the time of a step. A step with few prompt tokens does not predict one with many."""
        drafts = plan.drafts or (0,) * len(plan.counts)
        counts = [count - num for count, num in zip(plan.counts, drafts, strict=True)]
        num_tokens = sum(count for count in counts if count > 1)
        if seconds > 0 and 2 * num_tokens >= self.prompt_tokens:
            # At most twice what was computed: from more, no step would be long enough to find a way back.
            in_time = min(2 * num_tokens, num_tokens * self.target_s / seconds)
            # Halfway: another program may have used the processor during this step.
            self.prompt_tokens = max(_MIN_TOKENS, int((self.prompt_tokens + in_time) / 2))
