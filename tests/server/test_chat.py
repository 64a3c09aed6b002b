"""POST /v1/chat/completions over a real engine and a stub model whose every answer is known."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.helpers import Answer, ask
from tests.server.stub import SPECIAL, TOKENIZER, StubRunner, continuation, open_stub
from trio_llm.config import Config
from trio_llm.server.app import ServerApp, create_app

HI = [{"role": "user", "content": "hi"}]
HI_PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
async def runner() -> StubRunner:
    """Return a stub model."""
    return StubRunner()


@pytest.fixture
async def app(runner: StubRunner) -> AsyncIterator[ServerApp]:
    """Return an open app round it."""
    async with open_stub(runner) as engine:
        yield create_app(engine, Config())


async def chat(app: ServerApp, messages: Any = HI, **fields: Any) -> Answer:
    """Ask for an answer that is expected to work."""
    answer = await ask(app, "POST", "/v1/chat/completions", {"messages": messages, **fields})
    assert answer.status == 200, answer.body
    return answer


async def refused(app: ServerApp, messages: Any = HI, **fields: Any) -> dict[str, Any]:
    """Ask for an answer that is expected to be a 400, and return the error."""
    answer = await ask(app, "POST", "/v1/chat/completions", {"messages": messages, **fields})
    assert answer.status == 400, answer.body
    return answer.json()["error"]


async def said(app: ServerApp, messages: Any, **fields: Any) -> str:
    """Return what the assistant says in eight tokens."""
    return (await chat(app, messages, max_tokens=8, **fields)).json()["choices"][0]["message"]["content"]


async def test_the_answer(app: ServerApp) -> None:
    """A chat answer has OpenAI's shape, is rendered by the template, and counts its tokens."""
    body = (await chat(app, max_tokens=4)).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": continuation(HI_PROMPT, 4), "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    num_prompt = len(TOKENIZER.encode(HI_PROMPT))
    assert body["usage"]["prompt_tokens"] == num_prompt
    assert body["usage"]["total_tokens"] == num_prompt + 4


async def test_without_a_limit_the_rest_of_the_context_is_the_answer(app: ServerApp) -> None:
    """Chat has no default of 16 tokens: the answer may take what is left."""
    usage = (await chat(app)).json()["usage"]
    assert usage["total_tokens"] == 512
    assert (await chat(app, max_tokens=9, max_completion_tokens=3)).json()["usage"]["completion_tokens"] == 3


async def test_content_comes_as_text_parts_or_nothing(app: ServerApp) -> None:
    """Parts of text are joined by newlines, null is nothing, and other kinds of parts are refused by their place."""
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert await said(app, [{"role": "user", "content": parts}]) == await said(
        app, [{"role": "user", "content": "h\ni"}]
    )
    nothing = [{"role": "user", "content": None}, {"role": "user"}]
    assert await said(app, nothing) == await said(app, [{"role": "user", "content": ""}] * 2)
    image = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "http://example.com/x.png"}}]
    assert (await refused(app, [*HI, {"role": "user", "content": image}]))["param"] == "messages[1].content[1]"


async def test_roles(app: ServerApp) -> None:
    """A developer is a system to this template; an earlier call of a tool and its answer are turns."""
    assert await said(app, [{"role": "developer", "content": "x"}]) == await said(
        app, [{"role": "system", "content": "x"}]
    )
    assert await said(app, [{"role": "tool", "content": "x", "tool_call_id": "1"}])
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert await said(app, [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}])
    nameless = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert (await refused(app, [*HI, nameless]))["param"] == "messages[1].tool_calls[0].function"
    assert await said(app, [*HI, {"role": "assistant", "content": "x", "tool_calls": []}])


async def test_users_write_no_control_tokens(app: ServerApp, runner: StubRunner) -> None:
    """T1, CVE-2026-44222: control tokens spelled in a message reach the model as letters."""
    prompts: list[tuple[int, ...]] = []
    runner.hook = lambda plan: prompts.extend(admission.token_ids for admission in plan.admitted)
    await said(app, [{"role": "user", "content": "".join(SPECIAL), "name": SPECIAL[0]}])
    special = [token for token in prompts[0] if token in TOKENIZER.special_tokens.values()]
    assert [TOKENIZER.token_string(token) for token in special] == [SPECIAL[1], SPECIAL[2], SPECIAL[1]]


async def test_the_last_message_can_be_continued(app: ServerApp) -> None:
    """continue_final_message goes on inside the assistant's turn, and excludes opening a new one."""
    messages = [*HI, {"role": "assistant", "content": "It is "}]
    prompt = HI_PROMPT + "It is "
    assert await said(app, messages, continue_final_message=True) == continuation(prompt, 8)
    echoed = await said(app, messages, continue_final_message=True, add_generation_prompt=False, echo=True)
    assert echoed == "It is " + continuation(prompt, 8)
    error = await refused(app, messages, continue_final_message=True, add_generation_prompt=True)
    assert error["param"] == "continue_final_message"
    closed = HI_PROMPT.removesuffix("<|im_start|>assistant\n")
    assert await said(app, HI, add_generation_prompt=False) == continuation(closed, 8)


async def test_logprobs(app: ServerApp) -> None:
    """Each token comes with its bytes, its logprob and the likeliest ones."""
    body = (await chat(app, max_tokens=3, logprobs=True, top_logprobs=2)).json()
    choice = body["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == choice["message"]["content"]
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["a", "b"]
    plain = (await chat(app, max_tokens=1, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert plain[0]["top_logprobs"] == []
    whole = (await chat(app, max_tokens=1, logprobs=False)).json()
    assert whole["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 513}, "max_tokens"),
        ({"max_completion_tokens": 513}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300_000}]}, "messages"),
    ],
)
async def test_refusals(app: ServerApp, fields: dict[str, Any], param: str) -> None:
    """What cannot be is a 400 naming the field that the client sent."""
    assert (await refused(app, **fields))["param"] == param


async def test_too_long_a_conversation_is_refused_in_known_words(app: ServerApp) -> None:
    """Clients such as litellm and langchain recognise exactly these words and this code."""
    error = await refused(app, [{"role": "user", "content": "x" * 600}])
    num_tokens = len(TOKENIZER.encode(HI_PROMPT)) - len("hi") + 600
    assert error["code"] == "context_length_exceeded"
    assert "this model's maximum context length is 512 tokens" in error["message"].lower()
    assert f"However, your messages resulted in {num_tokens} tokens" in error["message"]


async def test_prompt_logprobs_and_ids(app: ServerApp) -> None:
    """prompt_logprobs and return_token_ids put the prompt beside the choices."""
    body = (await chat(app, max_tokens=1, prompt_logprobs=0, return_token_ids=True)).json()
    assert body["prompt_token_ids"] == TOKENIZER.encode(HI_PROMPT)
    assert len(body["prompt_logprobs"]) == len(body["prompt_token_ids"])
    assert body["prompt_logprobs"][0] is None
    assert len(body["choices"][0]["token_ids"]) == 1


STREAMED: list[dict[str, Any]] = [
    {"max_tokens": 8},
    {"max_tokens": 1},
    {"max_tokens": 8, "n": 3, "temperature": 1, "seed": 5},
    {"max_tokens": 8, "logprobs": True, "top_logprobs": 1},
    {"max_tokens": 30, "stop": continuation(HI_PROMPT, 30)[10:12]},
    {"max_tokens": 8, "echo": True, "return_token_ids": True},
]


@pytest.mark.parametrize("fields", STREAMED)
async def test_a_stream_says_what_the_whole_answer_says(app: ServerApp, fields: dict[str, Any]) -> None:
    """Joined, the chunks of every choice are the whole answer; each begins with the role and has one finish."""
    whole = (await chat(app, **fields)).json()
    streamed = await chat(app, **fields, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = streamed.events()
    assert (done, usage["choices"]) == ("[DONE]", [])
    assert usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert parts[0]["delta"]["role"] == "assistant"
        assert not any("role" in part["delta"] for part in parts[1:])
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        if choice["logprobs"] is not None:
            entries = [entry for part in parts[1:] for entry in part["logprobs"]["content"]]
            assert entries == choice["logprobs"]["content"]
        if "token_ids" in choice:
            assert [item for part in parts for item in part.get("token_ids", ())] == choice["token_ids"]
