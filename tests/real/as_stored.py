"""Holds a real model that is computed as stored to its widened twin."""

from __future__ import annotations

import torch

from tests.model.paged import Paged
from tests.real.first_choice import behind
from trio_llm.config import EngineConfig
from trio_llm.model.loading.loader import ModelPlan, inspect_model, load_model
from trio_llm.model.ops import cpu as native
from trio_llm.model.ops.dispatch import Dispatch, dispatching

# By how much a token may be less likely than the first choice, in logits, whose spread is about 4.
NEAR_TIE = 0.5


def check_as_stored(settings: EngineConfig, prompt: list[int]) -> ModelPlan:
    """Check that each token answered is the widened weights' first choice or nearly so; return the model's plan.

    The prompt's perplexity is within half a percent.
    """
    with dispatching(Dispatch("native", native, "cpu")):
        plan = inspect_model(settings, as_stored=True)
        stored = load_model(plan, torch.device("cpu"))
        (answer,) = Paged(stored, 1).greedy([prompt], 128, 60)
        (ours,) = Paged(stored, 1).prefill([prompt + answer], 128)
    twin = load_model(inspect_model(settings), torch.device("cpu"))
    (theirs,) = Paged(twin, 1).prefill([prompt + answer], 128)
    ids = torch.tensor(prompt + answer)[1:, None]
    losses = [-logits[:-1].log_softmax(-1).gather(1, ids)[: len(prompt) - 1].mean() for logits in (ours, theirs)]
    assert abs(float(losses[0] - losses[1])) < 0.005
    assert behind(theirs, prompt, answer) < NEAR_TIE
    return plan
