"""The whole core under every order of calls that Hypothesis can think of."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.core.loop import FULL, HYBRID, SLIDING, TWO_SIZES, Loop, prompt_of
from trio_llm.params import PoolingParams, SamplingParams

sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(6, 20),
    min_tokens=st.integers(0, 6),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (5,), (0,)]),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
)


class CoreMachine(RuleBasedStateMachine):
    """Submits, steps, aborts at three instants, fails rows; `Loop` checks the invariants after every verb."""

    @initialize(
        groups=st.sampled_from([FULL, SLIDING, HYBRID, TWO_SIZES]),
        num_blocks=st.integers(8, 24),
        budget=st.integers(1, 20),
        threshold=st.integers(0, 6),
        batch=st.integers(1, 6),
        caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
        depth=st.sampled_from([1, 2]),
        late=st.booleans(),
    )
    def begin(self, groups, num_blocks, budget, threshold, batch, caching, policy, depth, late) -> None:
        self.loop = Loop(
            groups,
            num_blocks=num_blocks + 8 * (len(groups) - 1),
            budget=budget,
            threshold=threshold,
            max_batch_size=batch,
            caching=caching,
            policy=policy,
            depth=depth,
            late=late,
        )

    @rule(
        length=st.integers(1, 24),
        seed=st.integers(0, 1),
        params=sampling | st.just(PoolingParams()),
        salt=st.sampled_from([b"", b"", b"x"]),
        priority=st.integers(0, 2),
        leader=st.integers(0, 4),
    )
    def submit(self, length, seed, params, salt, priority, leader) -> None:
        length = min(length, self.loop.max_model_len - 1)
        behind = len(self.loop.clients) - leader if leader and leader < len(self.loop.clients) else None
        self.loop.submit(prompt_of(length, seed), params, salt=salt, priority=priority, leader=behind)

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.loop.step()

    def _someone(self, back: int) -> int:
        return max(1, len(self.loop.clients) - back)

    @precondition(lambda self: self.loop.clients)
    @rule(back=st.integers(0, 6), when=st.sampled_from(["now", "before_plan", "in_flight"]))
    def abort(self, back: int, when: str) -> None:
        victim = self._someone(back)
        if when == "now":
            self.loop.abort(victim)
        else:
            self.loop.step(**{when: lambda: self.loop.abort(victim)})

    @precondition(lambda self: self.loop.clients)
    @rule(back=st.integers(0, 6))
    def fail(self, back: int) -> None:
        self.loop.step([self._someone(back)])

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.run()


TestCore = CoreMachine.TestCase
TestCore.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
