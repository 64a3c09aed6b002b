"""The engine without its event loop: the real scheduler, block manager and model, one step at a time."""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any, cast

import attrs

from trio_llm.core.block_math import longest_sequence
from trio_llm.demo import demo_model_path
from trio_llm.engine.admission import resolve
from trio_llm.engine.supervisor import core_setup, request_limits
from trio_llm.errors import InvalidRequestError, OutOfOrderError
from trio_llm.llm import check_types, engine_config
from trio_llm.messages import BlockAsk, BlockGrant, Commit, Finished, StepPlan, StepResult, Tokens
from trio_llm.model.load import load_runner
from trio_llm.notebook.timeline import History
from trio_llm.params import SamplingParams, Submission
from trio_llm.tokenizer import Tokenizer


def chat(question: str, system: str = "") -> str:
    """Write a question as the demo model's chat template does."""
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{before}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


class Stepper:
    """An engine that stands still between two steps, so that all of it can be looked at.

    A step is five verbs: `ask`, `reserve`, `plan`, `run`, `commit`. Each is one call of the scheduler, the block
    manager or the model, and returns the message that the next one takes.

    Args:
        settings: Those of EngineConfig, by their names; by default the demo model in float32, and 64 blocks.

    Attributes:
        scheduler, blocks, runner: The objects of a server.
        answers: request_id -> the tokens that its client got.
        ended: request_id -> the last event of its client.
        history: All steps, for pictures.
        seconds: Time of each step in the model.
    """

    def __init__(self, **settings: Any) -> None:
        defaults = {"model": str(demo_model_path()), "dtype": "float32", "num_kv_blocks": 64}
        config = engine_config({**defaults, **settings}, "Stepper").decided(on_gpu=False)
        assert config.model is not None
        self.runner = load_runner(config)
        self.tokenizer = Tokenizer.from_directory(config.model)
        self.decode = partial(self.tokenizer.decode, skip_special_tokens=False)
        info = self.runner.info
        longest = longest_sequence(info.num_kv_blocks - 1, info.kv_groups, config.max_tokens_in_flight)
        info = attrs.evolve(info, max_model_len=min(info.max_model_len, longest))
        setup = core_setup(attrs.evolve(config, max_model_len=info.max_model_len), info)
        self._limits = request_limits(config, info)
        self.scheduler = setup.scheduler()
        self.blocks = setup.block_manager(secret=b"any key will do in a notebook")
        self.history = History(self.decode, config.step_tokens)
        self.answers: dict[int, list[int]] = {}
        self.ended: dict[int, Finished] = {}
        self.seconds: list[float] = []
        self._closed = False
        self._ask: BlockAsk | None = None
        self._grant: BlockGrant | None = None
        self._plan: StepPlan | None = None
        self._result: StepResult | None = None

    def __repr__(self) -> str:
        return f"<Stepper: {self.scheduler!r}, {self.blocks!r}>"

    def _repr_html_(self) -> str:
        return f"{escape(repr(self.scheduler))}<br>{escape(repr(self.blocks))}"

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of a text."""
        return self.tokenizer.encode(prompt)

    def submit(self, prompt: str, *, priority: int = 0, **params: Any) -> int:
        """Queue a request and return its id, counted from 1. Greedy, unless `params` say otherwise.

        Args:
            prompt: A text; `chat` makes one of a question.
            params: Fields of SamplingParams.

        Raises:
            InvalidRequestError: A parameter or the prompt can never be served; nothing was queued.
        """
        request_id = len(self.answers) + 1
        if not isinstance(prompt, str):
            raise InvalidRequestError(f"A prompt is text here, not {prompt!r:.80}.", param="prompt")
        if unknown := params.keys() - {field.name for field in attrs.fields(SamplingParams)}:
            raise InvalidRequestError(f"SamplingParams has no {min(unknown)!r}.", param=min(unknown))
        wanted = SamplingParams(**{"temperature": 0, "max_tokens": 200, **params})
        check_types(wanted)
        submission = Submission(tuple(self.encode(prompt)), wanted, priority=priority)
        self.scheduler.submit(request_id, resolve(submission, self._limits))
        self.answers[request_id] = []
        return request_id

    # --- the five verbs -------------------------------------------------------------------------------------------

    def ask(self) -> BlockAsk | None:
        """Let the scheduler choose the rows of a step; None if there is nothing to do."""
        self._ask = self.scheduler.ask()
        return self._ask

    def reserve(self) -> BlockGrant:
        """Let the block manager give them blocks."""
        self._grant, self._plan = self.blocks.reserve(cast(BlockAsk, self._ask)), None
        return self._grant

    def plan(self) -> StepPlan | None:
        """Let the scheduler make one batch of the rows that got theirs; None if there is none."""
        self._plan, self._result = self.scheduler.plan(cast(BlockGrant, self._grant)), None
        return self._plan

    def run(self) -> StepResult:
        """Let the model compute the batch."""
        if self._plan is None or self._result is not None:
            why = "there is no batch" if self._plan is None else f"step {self._plan.step} has run already"
            raise OutOfOrderError("run()", why, "ask(), reserve() and plan()" if self._plan is None else "commit()")
        self._result = self.runner.step(self._plan)
        self.seconds.append(self._result.seconds)
        return self._result

    def commit(self) -> Commit | None:
        """Let the scheduler apply the result, and deliver its events; None if nothing ran."""
        if self._grant is None or (self._plan is not None and self._result is None):
            why = "nothing is planned" if self._plan is None else f"step {self._plan.step} has not run"
            raise OutOfOrderError("commit()", why, "run()" if self._plan is not None else "ask()")
        commit = None if self._result is None else self.scheduler.commit(self._result)
        for request_id, event in () if commit is None else commit.events:
            if isinstance(event, Tokens):
                self.answers[request_id] += event.token_ids
            elif isinstance(event, Finished):
                self.ended[request_id] = event
        self.history.add(self.scheduler, self.blocks, self._grant, self._plan, self._result)
        self._grant = self._plan = self._result = None
        return commit

    def step(self) -> bool:
        """Do all five; return False if there was nothing to do."""
        if self.ask() is None:
            return False
        self.reserve()
        if self.plan() is not None:
            self.run()
        self.commit()
        return True

    def steps(self, number: int) -> None:
        """Do some steps."""
        for _ in range(number):
            self.step()

    def finish(self) -> None:
        """Step until nothing is left to do."""
        while self.step():
            pass

    # --- what came of it ------------------------------------------------------------------------------------------

    def text(self, request_id: int) -> str:
        """Return the answer so far."""
        if request_id not in self.answers:
            raise InvalidRequestError(f"There is no request {request_id!r}: ids are 1 to {len(self.answers)}.")
        return self.tokenizer.decode(self.answers[request_id])

    def close(self) -> None:
        """Free the model's memory. Idempotent."""
        if not self._closed:
            self._closed = True
            self.runner.close()
