from __future__ import annotations

from tests.engine.fakes import FakeTokenizer, continuation, open_stub
from trio_llm.messages import SamplingParams

PROMPT = (1, 2, 3, 4, 5)


async def test_a_stream_yields_the_models_answer() -> None:
    """A greedy request gets exactly the tokens and the text of the model, and its usage."""
    async with open_stub() as engine:
        async with engine.open_stream(PROMPT, SamplingParams(temperature=0, max_tokens=20)) as stream:
            deltas = [delta async for delta in stream]
    answer = continuation(PROMPT, 20)
    assert sum((delta.token_ids for delta in deltas), ()) == answer
    assert "".join(delta.text for delta in deltas) == FakeTokenizer().decode(answer)
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert deltas[-1].usage is not None
    assert (deltas[-1].usage.prompt_tokens, deltas[-1].usage.completion_tokens) == (5, 20)
