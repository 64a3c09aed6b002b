"""/v1/completions/render and /v1/chat/completions/render, beyond single parameters: see test_parameters.py."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec
import pytest

from tests.server.helpers import ask
from tests.server.stub import TOKENIZER, StubRunner, open_stub
from trio_llm.config import Config, EngineConfig, LimitsConfig
from trio_llm.server.answers.rendered import RenderedRequest
from trio_llm.server.app import create_app

CHAT, COMPLETIONS = "/v1/chat/completions/render", "/v1/completions/render"
USER = [{"role": "user", "content": "hi"}]


async def post(path: str, body: dict[str, Any], status: int = 200, config: Config | None = None) -> Any:
    """Return the JSON of an answer of a new server."""
    runner = StubRunner()
    runner.info = attrs.evolve(runner.info, default_sampling={"temperature": 0.5, "top_k": 7})
    async with open_stub(runner) as engine:
        answer = await ask(create_app(engine, config or Config()), "POST", path, body)
        assert not runner.plans
    assert answer.status == status, answer.body
    return answer.json()


async def test_each_prompt_of_a_completion_is_a_request() -> None:
    """Texts and token ids, in their order, with ids of their own and the model's defaults."""
    found = await post(COMPLETIONS, {"prompt": ["hello", "é"], "seed": 3, "cache_salt": "s", "request_id": "mine"})
    first, second = msgspec.convert(found, list[RenderedRequest])
    assert [first.token_ids, second.token_ids] == [TOKENIZER.encode("hello"), TOKENIZER.encode("é")]
    params = first.sampling_params
    assert (params.temperature, params.top_k, params.seed, params.max_tokens) == (0.5, 7, 3, 16)
    assert (first.request_id, first.cache_salt, first.model) == ("cmpl-mine", "s", "stub")
    assert (first.stream, first.stream_options, first.priority, first.features) == (False, None, 0, None)
    ids = await post(COMPLETIONS, {"prompt": [5, 6, 7], "stream": True, "stream_options": {"include_usage": True}})
    assert (ids[0]["token_ids"], ids[0]["stream"]) == ([5, 6, 7], True)
    assert ids[0]["stream_options"] == {"include_usage": True, "continuous_usage_stats": False}


async def test_a_conversation_is_one_request() -> None:
    """It has the prompt that the template makes, and as many tokens as the context has left."""
    found = msgspec.convert(await post(CHAT, {"messages": USER}), RenderedRequest)
    assert TOKENIZER.decode(found.token_ids, skip_special_tokens=False).count("hi") == 1
    assert found.sampling_params.max_tokens == 512 - len(found.token_ids)
    assert found.request_id.startswith("chatcmpl-")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": USER, "model": "gpt-4"}, 404, "model"),
        (CHAT, {"messages": [{"role": "user", "content": "hi" * 2000}]}, 400, "messages"),
        (COMPLETIONS, {"prompt": list(range(3, 203)) * 3}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [10**6]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 3}, 400, "n"),
        (COMPLETIONS, {}, 400, "prompt"),
    ],
)
async def test_refusals_are_those_of_the_endpoints(path: str, body: dict[str, Any], status: int, param: str) -> None:
    """What could not be answered is not rendered either, in the same words."""
    config = Config(limits=LimitsConfig(max_samples=5))
    found = await post(path, body, status, config)
    assert found["error"]["param"] == param
    assert found == await post(path.removesuffix("/render"), body, status, config)


async def test_a_priority_is_rendered_and_warned_of() -> None:
    """The warning is the endpoint's: a priority counts only with that policy."""
    settings = (EngineConfig(), EngineConfig(scheduling_policy="priority"))
    async with open_stub(StubRunner()) as engine:
        for engine_config in settings:
            app = create_app(engine, Config(engine=engine_config))
            answer = await ask(app, "POST", CHAT, {"messages": USER, "priority": 3})
            assert answer.json()["priority"] == 3
            warned = "priority counts only" in answer.headers.get("warning", "")
            assert warned == (engine_config.scheduling_policy == "fcfs")
