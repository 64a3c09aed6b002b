"""The stepper is a server's engine, verb by verb."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from trio_llm.errors import ConfigError, InvalidRequestError, OutOfOrderError
from trio_llm.messages import Finished
from trio_llm.notebook.stepper import Stepper, chat


@pytest.fixture
def stepper() -> Iterator[Stepper]:
    """Return one with the demo model."""
    stepper = Stepper(num_kv_blocks=16, max_num_batched_tokens=32)
    yield stepper
    stepper.close()


def test_the_verbs_are_a_step(stepper: Stepper) -> None:
    """Each verb returns its message, the client gets its tokens, and the history has the step."""
    request_id = stepper.submit(chat("What is the capital of Japan?"))
    ask = stepper.ask()
    assert ask is not None and ask.waiting == (request_id,)
    assert stepper.reserve().request_ids == (request_id,)
    plan = stepper.plan()
    assert plan is not None and plan.samples == (True,)
    ((token_id,),) = stepper.run().token_ids
    assert stepper.answers[request_id] == []
    commit = stepper.commit()
    assert commit is not None and stepper.answers[request_id] == [token_id]
    assert stepper.history.moments[0].cells[request_id].kind == "prefill" and len(stepper.seconds) == 1
    assert stepper.text(request_id) == stepper.decode(stepper.answers[request_id])


def test_it_runs_to_the_end(stepper: Stepper) -> None:
    """The answer is the model's, nothing is left in the pool, and a step with nothing to do says so."""
    request_id = stepper.submit(chat("What is the capital of Japan?"))
    stepper.finish()
    assert stepper.text(request_id) == "The capital of Japan is Tokyo."
    assert isinstance(stepper.ended[request_id], Finished) and stepper.ended[request_id].reason == "stop"
    assert all(state.state != "used" for state in stepper.blocks.blocks())
    assert stepper.step() is False
    assert repr(stepper).startswith("<Stepper: <Scheduler at step") and "BlockManager" in stepper._repr_html_()


def test_settings_are_the_engines() -> None:
    """A setting of the engine is one of the stepper: without the prefix cache, nothing is found."""
    for caching, found in ((True, 16), (False, 0)):
        other = Stepper(num_kv_blocks=16, enable_prefix_caching=caching)
        ids = [other.submit(chat("Tell me a story about a fox.", "Be kind."), max_tokens=1) for _ in range(2)]
        other.finish()
        ids.append(other.submit(chat("Tell me a story about a fox.", "Be kind."), max_tokens=1))
        other.finish()
        assert other.ended[ids[-1]].usage.cached_tokens == found
        other.close()


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        (3, {}, "A prompt is text here, not 3"),
        ([5, 6], {}, "A prompt is text here"),
        ("hi", {"tempratur": 0}, "SamplingParams has no 'tempratur'"),
        ("hi", {"temperature": "x"}, "temperature = 'x' is not allowed: must be float"),
        ("hi", {"temperature": -1}, "temperature = -1 is not allowed"),
        ("hi", {"structured_outputs": 1}, "structured_outputs = 1 is not allowed"),
    ],
)
def test_what_can_never_be_served_is_named(stepper: Stepper, prompt: Any, params: dict[str, Any], says: str) -> None:
    """It is refused when it is submitted, not in the middle of a step, and leaves no request behind."""
    with pytest.raises(InvalidRequestError, match=says):
        stepper.submit(prompt, **params)
    assert stepper.answers == {} and stepper.step() is False


def test_verbs_out_of_order_say_what_comes_next(stepper: Stepper) -> None:
    """Each verb needs the one before it, once; what is out of order changes nothing."""
    for verb in (stepper.reserve, stepper.plan, stepper.run, stepper.commit):
        with pytest.raises(OutOfOrderError, match="Expected next"):
            verb()
    request_id = stepper.submit("hi", max_tokens=2)
    for verb in (stepper.ask, stepper.reserve, stepper.plan):
        verb()
    for verb in (stepper.reserve, stepper.plan):
        with pytest.raises(OutOfOrderError):
            verb()
    with pytest.raises(OutOfOrderError, match=r"commit\(\): step 1 has not run. Expected next: run\(\)"):
        stepper.commit()
    stepper.run()
    with pytest.raises(OutOfOrderError, match=r"run\(\): step 1 has run already. Expected next: commit\(\)"):
        stepper.run()
    stepper.commit()
    for verb in (stepper.run, stepper.commit):
        with pytest.raises(OutOfOrderError):
            verb()
    stepper.finish()
    assert len(stepper.answers[request_id]) == 2
    with pytest.raises(InvalidRequestError, match="There is no request 9: ids are 1 to 1"):
        stepper.text(9)
    stepper.close()  # The fixture closes it once more.


def test_a_setting_that_there_is_not_is_named() -> None:
    """The stepper's settings are checked as those of LLM are."""
    with pytest.raises(ConfigError, match="Stepper: foo = 1: no such setting"):
        Stepper(foo=1)
