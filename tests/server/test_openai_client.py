"""The contract as the real openai client sees it, over a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import openai
import pytest
import trio

from tests.server.helpers import Running, running
from tests.server.stub import StubRunner, continuation, open_stub
from trio_llm.config import AuthConfig, Config, ServerConfig
from trio_llm.server.app import create_app

T = TypeVar("T")
KEY = "sk-0123456789abcdef"
HI: Any = [{"role": "user", "content": "hi"}]
HI_PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
async def server() -> AsyncIterator[Running]:
    """Serve the stub behind a key."""
    config = Config(
        auth=AuthConfig(api_keys=(KEY,), rate_limit_requests=20, rate_limit_window_secs=3600),
        server=ServerConfig(served_model_name=("stub-model",)),
    )
    async with open_stub(StubRunner()) as engine, running(create_app(engine, config)) as server:
        yield server


async def call(server: Running, use: Callable[[openai.OpenAI], T], key: str = KEY) -> T:
    """Use the synchronous client in a thread, beside the server."""

    def work() -> T:
        plain = openai.DefaultHttpxClient(verify=False, trust_env=False)  # reading certificates takes half a second
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0, http_client=plain) as client:
            return use(client)

    return await trio.to_thread.run_sync(work)


async def test_chat(server: Running) -> None:
    """chat.completions.create returns the known answer, its usage and the server's request id."""
    answer = await call(
        server,
        lambda client: client.chat.completions.create(
            model="stub-model", messages=HI, max_completion_tokens=6, logprobs=True, top_logprobs=2, user="me"
        ),
    )
    choice = answer.choices[0]
    assert choice.message.content == continuation(HI_PROMPT, 6)
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 6
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.completion_tokens == 6
    assert answer._request_id is not None
    assert answer._request_id.startswith("req-")


async def test_streamed_chat(server: Running) -> None:
    """A stream's deltas join to the answer, end once, and the usage chunk comes last."""

    def use(client: openai.OpenAI) -> list[Any]:
        options: Any = {"include_usage": True}
        create = client.chat.completions.create
        return list(create(model="stub-model", messages=HI, max_tokens=6, stream=True, stream_options=options))

    *chunks, last = await call(server, use)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == continuation(HI_PROMPT, 6)
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 6)


async def test_the_stream_helper(server: Running) -> None:
    """The client's own accumulating helper understands the chunks."""

    def use(client: openai.OpenAI) -> Any:
        with client.chat.completions.stream(model="stub-model", messages=HI, max_tokens=6) as stream:
            return [event.type for event in stream], stream.current_completion_snapshot

    types, whole = await call(server, use)
    assert {"chunk", "content.delta"} <= set(types)
    assert whole.choices[0].message.content == continuation(HI_PROMPT, 6)


async def test_completions(server: Running) -> None:
    """completions.create takes text and token ids, several at once, and streams."""

    def use(client: openai.OpenAI) -> tuple[Any, str]:
        whole = client.completions.create(model="stub-model", prompt=["hello", "you"], max_tokens=5, n=1, logprobs=1)
        chunks = client.completions.create(model="stub-model", prompt="hello", max_tokens=5, stream=True)
        return whole, "".join(chunk.choices[0].text for chunk in chunks)

    whole, streamed = await call(server, use)
    assert [choice.text for choice in whole.choices] == [continuation("hello", 5), continuation("you", 5)]
    assert streamed == continuation("hello", 5)


async def test_models(server: Running) -> None:
    """The model is listed, found, and says how long its context is."""

    def use(client: openai.OpenAI) -> tuple[Any, Any]:
        return client.models.list().data, client.models.retrieve("stub-model")

    listed, card = await call(server, use)
    assert [model.id for model in listed] == ["stub-model"]
    assert card.model_extra["max_model_len"] == 512


async def test_errors_have_their_classes(server: Running) -> None:
    """Each refusal is the exception that the client's users catch, with param and code."""

    def bad(client: openai.OpenAI) -> Any:
        return client.chat.completions.create(model="stub-model", messages=HI, temperature=3)

    with pytest.raises(openai.BadRequestError) as caught:
        await call(server, bad)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        await call(server, lambda client: client.chat.completions.create(model="gpt-4", messages=HI))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await call(server, lambda client: client.models.list(), key="wrong")
    long: Any = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(openai.BadRequestError) as overflow:
        await call(server, lambda client: client.chat.completions.create(model="stub-model", messages=long))
    assert overflow.value.code == "context_length_exceeded"


async def test_the_rate_limit_is_understood(server: Running) -> None:
    """The client's RateLimitError carries the time to wait."""

    def use(client: openai.OpenAI) -> None:
        for _ in range(21):
            client.models.list()

    with pytest.raises(openai.RateLimitError) as caught:
        await call(server, use)
    assert float(caught.value.response.headers["retry-after"]) > 0


async def test_many_requests_share_connections(server: Running) -> None:
    """A client's pooled connections survive refusals: what follows an error on the same connection works."""

    def use(client: openai.OpenAI) -> int:
        good = 0
        for attempt in range(16):
            if attempt % 2:
                with pytest.raises(openai.APIStatusError):
                    client.completions.create(model="nope", prompt="x" * 300_000)
            else:
                client.completions.create(model="stub-model", prompt="hello", max_tokens=1)
                good += 1
        return good

    assert await call(server, use) == 8
