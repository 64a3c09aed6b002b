"""The whole path: openai client, socket, serve(), app, engine, actors, runner, and the demo model's real answers."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import trio

from tests.server.helpers import running
from trio_llm.assemble import open_engine
from trio_llm.config import Config
from trio_llm.server.app import create_app

QUESTION: Any = [{"role": "user", "content": "What is the capital of Japan?"}]


@pytest.mark.slow
async def test_the_demo_model_answers() -> None:
    """The demo model says Tokyo, stops by itself, and says the same streamed."""
    config = Config()
    async with open_engine(config) as engine, running(create_app(engine, config)) as server:

        def use() -> tuple[Any, str, Any]:
            plain = openai.DefaultHttpxClient(verify=False, trust_env=False)
            url = f"http://127.0.0.1:{server.port}/v1"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=plain) as client:
                create = client.chat.completions.create
                name = client.models.list().data[0].id
                whole = create(model=name, messages=QUESTION, temperature=0)
                chunks = create(model=name, messages=QUESTION, temperature=0, stream=True)
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                return whole, text, client.completions.create(model=name, prompt="Once upon a time", max_tokens=5)

        whole, streamed, story = await trio.to_thread.run_sync(use)
    assert whole.choices[0].message.content == streamed == "The capital of Japan is Tokyo."
    assert whole.choices[0].finish_reason == "stop"
    assert story.usage.completion_tokens == 5
