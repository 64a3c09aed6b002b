"""What a request may ask of its answer beside the text: how often a stream is written, what is told of the prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.helpers import ask
from tests.server.stub import StubRunner, open_stub, stub_tokenizer
from trio_llm.config import Config
from trio_llm.server.app import ServerApp, create_app

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI: Any = {"messages": [{"role": "user", "content": "hi"}]}
BOTH = [(CHAT, HI), (COMPLETIONS, {"prompt": "hi"})]
IN_CIRCLES = "Well: " + "na " * 50


@pytest.fixture
async def app() -> AsyncIterator[ServerApp]:
    """Return an app round a model that goes in circles."""
    async with open_stub(StubRunner(reply=IN_CIRCLES)) as engine:
        yield create_app(engine, Config())


async def post(app: ServerApp, path: str, body: dict[str, Any], **fields: Any) -> Any:
    """Return the body of a good answer."""
    answer = await ask(app, "POST", path, {**body, **fields})
    assert answer.status == 200, answer.body
    return answer.events() if fields.get("stream") else answer.json()


@pytest.mark.parametrize(("path", "body"), BOTH)
async def test_an_answer_in_circles_ends(app: ServerApp, path: str, body: dict[str, Any]) -> None:
    """repetition_detection ends the answer after min_count repetitions, streamed or not, and says so."""
    wanted = {"max_pattern_size": 3, "min_count": 4}
    asked = {**body, "max_tokens": 200, "repetition_detection": wanted}
    choice = (await post(app, path, asked))["choices"][0]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    assert text == "Well:" + " na" * 4
    assert (choice["finish_reason"], choice["stop_reason"]) == ("repetition", "repetition_detected")
    *chunks, _ = await post(app, path, asked, stream=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(c["delta"].get("content", "") if path == CHAT else c["text"] for c in choices) == text
    assert choices[-1]["finish_reason"] == "repetition"


@pytest.mark.parametrize(("path", "body"), BOTH)
async def test_a_stream_in_larger_pieces(app: ServerApp, path: str, body: dict[str, Any]) -> None:
    """With stream_interval the first token comes at once, and then no fewer than so many at a time."""
    asked = {**body, "max_tokens": 30, "return_token_ids": True, "stream": True}
    for fields in ({}, {"n": 2}):
        *chunks, _ = await post(app, path, {**asked, **fields}, stream=True, stream_interval=8)
        for index in range(fields.get("n", 1)):
            choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            sizes = [len(c["token_ids"]) for c in choices if "token_ids" in c]
            assert sizes[0] < 8 <= min(sizes[1:-1])
            assert sum(sizes) == 30


@pytest.mark.parametrize(("path", "body"), BOTH)
async def test_the_prompt_as_the_model_sees_it(app: ServerApp, path: str, body: dict[str, Any]) -> None:
    """return_prompt_text tells the prompt's text, control tokens included, once a choice."""
    whole = await post(app, path, body, return_prompt_text=True, max_tokens=2)
    first, *rest = (await post(app, path, body, return_prompt_text=True, max_tokens=2, stream=True))[:-1]
    if path == CHAT:
        expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert whole["prompt_text"] == first["prompt_text"] == expected
        assert not any("prompt_text" in chunk for chunk in rest)
    else:
        assert whole["choices"][0]["prompt_text"] == first["choices"][0]["prompt_text"] == "hi"
        assert not any("prompt_text" in chunk["choices"][0] for chunk in rest)


@pytest.mark.parametrize(("path", "body"), BOTH)
async def test_the_id_a_client_chose(app: ServerApp, path: str, body: dict[str, Any]) -> None:
    """request_id is the answer's id behind the usual prefix."""
    prefix = "chatcmpl" if path == CHAT else "cmpl"
    assert (await post(app, path, body, request_id="run-7.1", max_tokens=1))["id"] == f"{prefix}-run-7.1"


async def test_documents_reach_a_template_that_knows_them(app: ServerApp) -> None:
    """Documents are the template's variable; a template that does not look at it makes them an error."""
    tokenizer = stub_tokenizer(
        "{% for d in documents or [] %}[{{ d.title }}]{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    documents = [{"title": "<|im_end|>Owls", "text": "They fly."}]
    async with open_stub(StubRunner(), tokenizer) as engine:
        answer = await post(create_app(engine, Config()), CHAT, HI, documents=documents, return_prompt_text=True)
        assert answer["prompt_text"] == "[<|im_end|>Owls]hi"
        assert answer["usage"]["prompt_tokens"] > 8  # What looks like a control token is text.
    refused = await ask(app, "POST", CHAT, {**HI, "documents": documents})
    assert (refused.status, refused.json()["error"]["param"]) == (400, "documents")


async def test_a_refusal_of_an_earlier_turn_is_what_was_said() -> None:
    """An assistant's refusal stands in the prompt as its words."""
    turns = [{"role": "assistant", "content": None, "refusal": "No."}, {"role": "user", "content": "Why?"}]
    async with open_stub(StubRunner()) as engine:
        answer = await post(create_app(engine, Config()), CHAT, {"messages": turns}, return_prompt_text=True)
    assert answer["prompt_text"].startswith("<|im_start|>assistant\nNo.<|im_end|>")


async def test_a_stop_string_ends_each_answer_as_it_comes(app: ServerApp) -> None:
    """Also of an answer that is returned whole beside others: the model writes no token more for it."""
    prompts = {"prompt": ["a", "b", "c"], "max_tokens": 200, "ignore_eos": True, "stop": IN_CIRCLES[3:6]}
    answer = await post(app, "/v1/completions", prompts)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 3
    metrics = (await app.services.engine.render_metrics()).decode()
    generated = next(line for line in metrics.splitlines() if line.startswith("vllm:generation_tokens_total"))
    assert float(generated.rpartition(" ")[2]) < 100
