from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.engine.fakes import EOS, FakeTokenizer, StubRunner, continuation, open_stub
from trio_llm.engine import Delta, Engine, open_samples
from trio_llm.messages import Finished, StepPlan, Tokens, Usage
from trio_llm.params import PoolingParams, SamplingParams, Submission

PROMPT = (1, 2, 3, 4, 5)
TEXT = FakeTokenizer().decode


def greedy(max_tokens: int | None = 20, **more: Any) -> SamplingParams:
    """Return parameters whose answer is known."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


async def collect(engine: Engine, params: SamplingParams, prompt: Sequence[int] = PROMPT) -> Delta:
    """Return a request's whole answer."""
    async with engine.open_stream(Submission(prompt, params)) as stream:
        return await stream.collect()


async def test_a_stream_yields_the_models_answer() -> None:
    """A greedy request gets exactly the tokens and the text of the model, one finish and its usage."""
    async with open_stub() as engine, engine.open_stream(Submission(PROMPT, greedy())) as stream:
        deltas = [delta async for delta in stream]
    answer = continuation(PROMPT, 20)
    assert sum((delta.token_ids for delta in deltas), ()) == answer
    assert "".join(delta.text for delta in deltas) == TEXT(answer)
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert [delta.usage for delta in deltas] == [None] * (len(deltas) - 1) + [Usage(5, 20, 0)]


async def test_a_late_reader_gets_everything_at_once() -> None:
    """A reader that comes when all is over finds one delta with the whole answer; the engine did not wait for it."""
    async with open_stub() as engine, engine.open_stream(Submission(PROMPT, greedy())) as stream:
        await wait_all_tasks_blocked()
        assert engine.health().num_running == 0
        deltas = [delta async for delta in stream]
    assert [delta.token_ids for delta in deltas] == [continuation(PROMPT, 20)]


async def test_max_tokens_none_is_the_rest_of_the_context() -> None:
    """Without max_tokens the answer fills the context."""
    async with open_stub(StubRunner(max_model_len=32)) as engine:
        whole = await collect(engine, greedy(None))
    assert whole.token_ids == continuation(PROMPT, 27)


async def test_max_tokens_beyond_the_context_is_clamped() -> None:
    """Asking for more than the context holds is not an error: the answer ends for length where the context does."""
    async with open_stub(StubRunner(max_model_len=32)) as engine:
        whole = await collect(engine, greedy(1000))
    assert (len(whole.token_ids), whole.finish_reason) == (27, "length")


async def test_no_output_token_may_be_asked_for() -> None:
    """max_tokens 0 scores the prompt: no token, no text, but the prompt's logprobs."""
    async with open_stub() as engine, engine.open_stream(Submission(PROMPT, greedy(0, prompt_logprobs=0))) as stream:
        whole = await stream.collect()
        scores = stream.prompt_logprobs
    assert (whole.text, whole.token_ids, whole.finish_reason) == ("", (), "length")
    assert whole.usage == Usage(5, 0, 0)
    assert scores is not None
    assert [entry and entry.token_id for entry in scores] == [None, 2, 3, 4, 5]


async def test_logprobs_stay_aligned_with_tokens() -> None:
    """Every delta has one logprob entry per token, of that very token."""
    async with open_stub() as engine, engine.open_stream(Submission(PROMPT, greedy(logprobs=1))) as stream:
        async for delta in stream:
            assert delta.logprobs is not None
            assert tuple(entry.token_id for entry in delta.logprobs) == delta.token_ids


async def test_a_stop_string_ends_the_request_early() -> None:
    """Text before the stop string is the answer, the string is the reason, and the sequence stops computing."""
    answer = continuation(PROMPT, 40)
    stop = TEXT(answer[4:7])
    runner = StubRunner()
    async with open_stub(runner) as engine:
        whole = await collect(engine, greedy(400, stop=(stop,)))
        await engine.wait_idle()
    assert (whole.text, whole.finish_reason, whole.stop_reason) == (TEXT(answer[:4]), "stop", stop)
    assert whole.token_ids == answer[:7]
    assert whole.usage == Usage(5, 7, 0)
    assert len(runner.plans) < 20


async def test_a_stop_string_may_be_part_of_the_answer() -> None:
    """include_stop_str_in_output shows the stop string that ended the answer."""
    answer = continuation(PROMPT, 20)
    params = greedy(stop=(TEXT(answer[4:7]),), include_stop_str_in_output=True)
    async with open_stub() as engine:
        whole = await collect(engine, params)
    assert whole.text == TEXT(answer[:7])


async def test_min_tokens_holds_back_stop_strings() -> None:
    """A stop string within the first min_tokens tokens is ordinary text."""
    answer = continuation(PROMPT, 20)
    async with open_stub() as engine:
        whole = await collect(engine, greedy(stop=(TEXT(answer[2:4]),), min_tokens=10))
    assert whole.text == TEXT(answer)


async def test_a_stop_token_is_reported_but_not_shown() -> None:
    """The id that ended the request is among its tokens and is the stop reason; its text is not in the answer."""
    answer = continuation(PROMPT, 20)
    async with open_stub() as engine:
        whole = await collect(engine, greedy(stop_token_ids=(answer[6],)))
    end = answer.index(answer[6]) + 1
    assert (whole.token_ids, whole.text, whole.stop_reason) == (answer[:end], TEXT(answer[: end - 1]), answer[6])


async def test_the_end_of_sequence_needs_no_reason() -> None:
    """The primary end-of-sequence token finishes with "stop" and no stop reason."""

    class Ending(StubRunner):
        def step(self, plan: StepPlan) -> Any:
            result = super().step(plan)
            return result if plan.starts[0] < 8 else type(result)(result.step, ((EOS,),))

    async with open_stub(Ending()) as engine:
        whole = await collect(engine, greedy())
    assert (whole.token_ids[-1], whole.finish_reason, whole.stop_reason) == (EOS, "stop", None)
    assert whole.text == TEXT(whole.token_ids[:-1])


@pytest.mark.parametrize("cut", range(1, 9))
async def test_text_does_not_depend_on_how_events_are_merged(cut: int) -> None:
    """However many steps a reader sleeps through, the deltas concatenate to the same text and end in the same way."""
    answer = continuation(PROMPT, 20)
    stop = TEXT(answer[9:12])
    async with open_stub() as engine, engine.open_stream(Submission(PROMPT, greedy(stop=(stop,)))) as stream:
        text, reads = "", 0
        async for delta in stream:
            text += delta.text
            reads += 1
            if reads % cut == 0:
                await wait_all_tasks_blocked()
    assert (text, delta.stop_reason) == (TEXT(answer[:9]), stop)


async def test_an_unseeded_request_gets_a_seed_of_its_own() -> None:
    """Without a seed two requests sample differently; with one they sample alike."""
    async with open_stub() as engine:
        free = [await collect(engine, SamplingParams(max_tokens=20)) for _ in range(2)]
        fixed = [await collect(engine, SamplingParams(max_tokens=20, seed=7)) for _ in range(2)]
    assert free[0].text != free[1].text
    assert fixed[0].text == fixed[1].text == TEXT(continuation(PROMPT, 20, seed=7))


async def test_samples_of_one_prompt() -> None:
    """N samples use seed, seed + 1, ...; the later ones find the prompt in the prefix cache."""
    prompt = tuple(range(40))
    params = SamplingParams(max_tokens=5, seed=3, n=3)
    async with open_stub() as engine, open_samples(engine, Submission(prompt, params)) as streams:
        answers = [await stream.collect() for stream in streams]
    assert [answer.token_ids for answer in answers] == [continuation(prompt, 5, seed) for seed in (3, 4, 5)]
    assert [answer.usage and answer.usage.cached_tokens for answer in answers] == [0, 32, 32]


async def test_an_embedding_comes_with_its_usage() -> None:
    """Embed returns the runner's vector and counts the prompt's tokens only."""
    async with open_stub() as engine:
        vector, usage = await engine.embed(Submission(PROMPT, PoolingParams()))
    assert (vector, usage) == ((1.0, 0.0, 0.0, 5.0), Usage(5, 0, 0))


async def test_usage_is_the_cores() -> None:
    """What a stream counts by itself is what the core counted."""
    seen: list[Any] = []

    async with open_stub() as engine:
        stream = engine.open_stream(Submission(PROMPT, greedy()))
        while not (seen and isinstance(seen[-1], Finished)):
            seen += await stream._mailbox.receive()
        again = await collect(engine, greedy())
    assert seen[-1].usage == again.usage
    assert sum(len(event.token_ids) for event in seen if isinstance(event, Tokens)) == 20


async def test_reading_on_after_the_end_yields_nothing() -> None:
    """A finished stream stays finished, and closing it twice is fine."""
    async with open_stub() as engine, engine.open_stream(Submission(PROMPT, greedy(2))) as stream:
        await stream.collect()
        stream.close()
        assert [delta async for delta in stream] == []


async def test_a_broken_tokenizer_hurts_one_request_only() -> None:
    """An error while decoding is raised in its reader's task; another request goes on."""
    async with open_stub() as engine:
        good = engine.open_stream(Submission(PROMPT, greedy()))
        bad = engine.open_stream(Submission(PROMPT, greedy()))
        bad._text._detokenizer._decode = lambda ids: 1 / 0  # type: ignore[assignment,return-value]
        with pytest.raises(ZeroDivisionError):
            async with bad:
                await bad.collect()
        assert (await good.collect()).token_ids == continuation(PROMPT, 20)
        await engine.wait_idle()


async def test_closing_from_a_cancelled_task_aborts() -> None:
    """Leaving a stream while cancelled still aborts its request: close needs no await."""
    async with open_stub() as engine:
        with trio.CancelScope() as scope:
            async with engine.open_stream(Submission(PROMPT, greedy(400))) as stream:
                async for _ in stream:
                    scope.cancel()
        await engine.wait_idle()
        assert len(engine.trace) < 400
