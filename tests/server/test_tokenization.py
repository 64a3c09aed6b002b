"""/tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.helpers import ask
from tests.server.stub import SPECIAL, TOKENIZER, open_stub
from trio_llm.config import Config
from trio_llm.server.app import ServerApp, create_app


@pytest.fixture
async def app() -> AsyncIterator[ServerApp]:
    """Return an open app."""
    async with open_stub() as engine:
        yield create_app(engine, Config())


async def post(app: ServerApp, path: str, status: int = 200, **body: Any) -> Any:
    """Post a body and return the answer's."""
    answer = await ask(app, "POST", path, body)
    assert answer.status == status, answer.body
    return answer.json()


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_there_and_back(app: ServerApp, prefix: str) -> None:
    """A text becomes its tokens, with their strings where asked, and tokens their text, under both paths."""
    told = await post(app, f"{prefix}/tokenize", prompt="hello é", return_token_strs=True)
    ids = TOKENIZER.encode("hello é")
    assert told["tokens"] == ids
    assert (told["count"], told["max_model_len"]) == (len(ids), 512)
    assert told["token_strs"] == [TOKENIZER.token_string(i) for i in ids]
    assert await post(app, f"{prefix}/detokenize", tokens=ids) == {"prompt": "hello é"}
    assert (await post(app, f"{prefix}/tokenize", prompt=""))["tokens"] == []


async def test_a_conversation_is_counted_as_it_is_answered(app: ServerApp) -> None:
    """The tokens of messages are those of the prompt that a chat makes of them."""
    messages = [{"role": "user", "content": "hi"}]
    told = await post(app, "/tokenize", messages=messages)
    answer = await post(app, "/v1/chat/completions", messages=messages, max_tokens=1)
    assert told["count"] == answer["usage"]["prompt_tokens"]
    shorter = await post(app, "/tokenize", messages=messages, add_generation_prompt=False)
    assert shorter["count"] < told["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**32]}, "tokens"),
        ("/detokenize", {"tokens": [2**80]}, None),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
async def test_refusals_name_the_field(app: ServerApp, path: str, body: dict[str, Any], param: str) -> None:
    """What cannot be tokenized is a 400 naming the field."""
    assert (await post(app, path, status=400, **body))["error"]["param"] == param


async def test_another_model_is_not_found(app: ServerApp) -> None:
    """A model that is not served is a 404, here as everywhere."""
    await post(app, "/tokenize", status=404, prompt="a", model="gpt-4")
    await post(app, "/detokenize", status=404, tokens=[1], model="gpt-4")


async def test_control_tokens_are_read_as_completions_reads_them(app: ServerApp) -> None:
    """A prompt's control tokens count as one each, as in /v1/completions; detokenizing spells them."""
    ids = (await post(app, "/tokenize", prompt=SPECIAL[0]))["tokens"]
    assert ids == [TOKENIZER.special_tokens[SPECIAL[0]]]
    assert await post(app, "/detokenize", tokens=ids) == {"prompt": SPECIAL[0]}


async def test_the_tokenizer_introduces_itself(app: ServerApp) -> None:
    """GET /tokenizer_info tells size, template and special tokens."""
    told = (await ask(app, "GET", "/tokenizer_info")).json()
    assert told["vocab_size"] == TOKENIZER.vocab_size
    assert told["chat_template"] == TOKENIZER.chat_template
    assert told["eos_token"] == SPECIAL[0]
