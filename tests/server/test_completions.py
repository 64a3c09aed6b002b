"""POST /v1/completions over a real engine and a stub model whose every answer is known."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from tests.server.helpers import Answer, ask
from tests.server.stub import LETTERS, TOKENIZER, GatedWorker, StubRunner, continuation, open_stub
from trio_llm.config import AuthConfig, Config, EngineConfig
from trio_llm.engine import Engine
from trio_llm.server.app import ServerApp, create_app

ALL = tuple(TOKENIZER.encode("hello"))


@pytest.fixture
async def runner() -> StubRunner:
    """Return a stub model."""
    return StubRunner()


@pytest.fixture
async def engine(runner: StubRunner) -> AsyncIterator[Engine]:
    """Return an engine round it."""
    async with open_stub(runner) as engine:
        yield engine


@pytest.fixture
async def app(engine: Engine) -> ServerApp:
    """Return an open app."""
    return create_app(engine, Config())


async def complete(app: ServerApp, prompt: Any = "hello", **fields: Any) -> Answer:
    """Ask for a completion that is expected to work."""
    answer = await ask(app, "POST", "/v1/completions", {"prompt": prompt, **fields})
    assert answer.status == 200, answer.body
    return answer


async def refused(app: ServerApp, prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    """Ask for a completion that is expected to be a 400, and return the error."""
    answer = await ask(app, "POST", "/v1/completions", {"prompt": prompt, **fields})
    assert answer.status == 400, answer.body
    return answer.json()["error"]


async def test_the_answer(app: ServerApp) -> None:
    """A completion has OpenAI's shape, sixteen tokens by default, and counts them."""
    body = (await complete(app)).json()
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "stub")
    assert body["choices"] == [
        {
            "index": 0,
            "text": continuation("hello", 16),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    usage = {"prompt_tokens": 5, "completion_tokens": 16, "total_tokens": 21}
    assert body["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hi", ["hi"]),
        (["hi"], ["hi"]),
        (["hi", "you"], ["hi", "you"]),
        (TOKENIZER.encode("hi"), ["hi"]),
        ([TOKENIZER.encode("hi"), TOKENIZER.encode("you")], ["hi", "you"]),
        (["hi", TOKENIZER.encode("you")], ["hi", "you"]),
    ],
)
async def test_prompts_come_as_text_or_ids_alone_or_many(app: ServerApp, prompt: Any, texts: list[str]) -> None:
    """A prompt is a text or token ids, or a list of them; choices are in the order of the prompts."""
    body = (await complete(app, prompt, max_tokens=4)).json()
    assert [choice["text"] for choice in body["choices"]] == [continuation(text, 4) for text in texts]
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, texts))


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [""], ["a", ""], [1.5], [True], [["a"]], [[1, "a"]], [{}], [None], ["a"] * 1025, [-1], [10**9]],
)
async def test_prompts_that_are_none(app: ServerApp, prompt: Any) -> None:
    """H-P01: an empty prompt, a wrong type, an id that is no token and too many prompts are 400s naming `prompt`."""
    assert (await refused(app, prompt))["param"] == "prompt"


@pytest.mark.parametrize("prompt", ["x" * 512, ["ok", "x" * 600], [3] * 512, "x" * 200_000])
async def test_a_prompt_too_long_is_refused_with_the_numbers(app: ServerApp, prompt: Any) -> None:
    """A prompt that leaves no room is a 400 in the words clients recognise, without being tokenized if absurd."""
    error = await refused(app, prompt)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 512 tokens. However, your prompt")
    assert ("at least" in error["message"]) == (len(prompt) > 1000)


async def test_the_longest_prompt_fits(app: ServerApp) -> None:
    """A prompt one token short of the context gets one token of answer."""
    body = (await complete(app, "x" * 511, max_tokens=100)).json()
    assert body["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "llo"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "hel"),
        ({"truncate_prompt_tokens": 99}, "hello"),
        ({"truncate_prompt_tokens": -1}, "hello"),
    ],
)
async def test_truncation_is_asked_for(app: ServerApp, fields: dict[str, Any], kept: str) -> None:
    """A prompt is shortened only where the request says so, by default keeping its end."""
    body = (await complete(app, max_tokens=4, **fields)).json()
    assert body["choices"][0]["text"] == continuation(kept, 4)
    assert body["usage"]["prompt_tokens"] == len(kept)


async def test_truncation_to_the_context(app: ServerApp) -> None:
    """-1 keeps what fits, of any length."""
    body = (await complete(app, "x" * 5000, truncate_prompt_tokens=-1, max_tokens=4)).json()
    assert body["usage"]["prompt_tokens"] == 511
    error = await refused(app, truncate_prompt_tokens=0)
    assert error["param"] == "truncate_prompt_tokens"
    assert error["message"] == "truncate_prompt_tokens = 0 is not allowed: at least 1, or -1 for as many as fit."


async def test_samples(app: ServerApp) -> None:
    """Seeded samples differ, the first one is what n = 1 gives, and n at temperature 0 is accepted."""
    many = (await complete(app, ["a", "b"], n=3, temperature=1, seed=7, max_tokens=8)).json()
    texts = [choice["text"] for choice in many["choices"]]
    assert len(set(texts)) == 6
    one = (await complete(app, "b", temperature=1, seed=7, max_tokens=8)).json()
    assert texts[3] == one["choices"][0]["text"]
    assert many["usage"]["prompt_tokens"] == 2
    assert many["usage"]["completion_tokens"] == 48
    greedy = (await complete(app, n=2, best_of=2, temperature=0, max_tokens=4)).json()
    assert [choice["text"] for choice in greedy["choices"]] == [continuation("hello", 4)] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"n": 128, "prompt": ["a"] * 9}, "n"),
        ({"max_tokens": 513}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"bad_words": ["x" * 1100]}, "bad_words"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
    ],
)
async def test_values_that_do_not_go_together(app: ServerApp, fields: dict[str, Any], param: str) -> None:
    """What no single field shows is refused as well, by the name of the field to change."""
    assert (await refused(app, **fields))["param"] == param


async def test_parameters_reach_the_model(app: ServerApp, runner: StubRunner) -> None:
    """Every sampling field of the request arrives in the engine's parameters."""
    seen: list[Any] = []
    runner.hook = lambda plan: seen.extend(admission.params for admission in plan.admitted)
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "seed": 3, "min_tokens": 2, "max_tokens": 4, "ignore_eos": True,
    }  # fmt: skip
    more = {"logit_bias": {"3": 1}, "allowed_token_ids": list(LETTERS), "stop_token_ids": [4], "bad_words": ["ab"]}
    await complete(app, **fields, **more, skip_special_tokens=False)
    params = seen[0]
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.logit_bias, params.allowed_token_ids, params.stop_token_ids) == ({3: 1.0}, LETTERS, (4,))
    assert params.bad_words_token_ids == (tuple(TOKENIZER.encode("ab")), tuple(TOKENIZER.encode(" ab")))


@pytest.mark.parametrize(("given", "used"), [(None, 0.6), (0, 0.0), (1e-6, 0.0), (0.001, 0.01), (0.7, 0.7)])
async def test_defaults_are_the_models(given: float | None, used: float) -> None:
    """Without a value the model's generation_config counts; tiny temperatures are greedy or raised, as in vLLM."""
    runner = StubRunner(default_sampling={"temperature": 0.6, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1})
    seen: list[Any] = []
    runner.hook = lambda plan: seen.extend(admission.params for admission in plan.admitted)
    async with open_stub(runner) as engine:
        await complete(create_app(engine, Config()), temperature=given)
    params = seen[0]
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (used, 0.8, 20, 1.1)


async def test_a_raised_temperature_is_said(app: ServerApp) -> None:
    """A temperature that is raised to the least that works is named in a Warning header."""
    assert "temperature" in (await complete(app, temperature=0.001)).headers["warning"]
    assert "warning" not in (await complete(app, temperature=0.5)).headers


async def test_a_priority_that_does_not_count_is_said(engine: Engine) -> None:
    """Under first come, first served a priority is answered with a warning; under the priority policy it counts."""
    for policy, warned in (("fcfs", True), ("priority", False)):
        app = create_app(engine, Config(engine=EngineConfig(scheduling_policy=policy)))
        assert ("warning" in (await complete(app, priority=-3)).headers) == warned


async def test_stop_strings(app: ServerApp) -> None:
    """Output ends before a stop string, or behind it if asked; the answer says which one."""
    text = continuation("hello", 40)
    stop = text[5:8]
    at = text.index(stop)
    body = (await complete(app, max_tokens=40, stop=[stop, "#"])).json()
    assert body["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "text": text[:at],
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": stop,
    }
    body = (await complete(app, max_tokens=40, stop=stop, include_stop_str_in_output=True)).json()
    assert body["choices"][0]["text"] == text[: at + 3]
    stop_id = TOKENIZER.encode(text[3])[0]
    body = (await complete(app, max_tokens=40, stop_token_ids=[stop_id])).json()
    assert body["choices"][0]["text"] == text[: text.index(text[3])]
    assert body["choices"][0]["stop_reason"] == stop_id


async def test_logprobs(app: ServerApp) -> None:
    """Columns of equal length; the sampled token is among the likeliest with the very same number."""
    body = (await complete(app, max_tokens=3, logprobs=2)).json()
    columns = body["choices"][0]["logprobs"]
    text = body["choices"][0]["text"]
    assert columns["tokens"] == list(text)
    assert columns["text_offset"] == [0, 1, 2]
    for token, logprob, top in zip(columns["tokens"], columns["token_logprobs"], columns["top_logprobs"], strict=True):
        assert top[token] == logprob
        assert {"a": top["a"], "b": top["b"]} == {"a": -0.5, "b": -1.5}
        assert len(top) <= 3


async def test_scoring_a_prompt(app: ServerApp) -> None:
    """Echo with logprobs gives the prompt's too, null first; this is what evaluation harnesses read."""
    prompt = TOKENIZER.encode("abc")
    body = (await complete(app, prompt, echo=True, logprobs=1, max_tokens=1)).json()
    choice = body["choices"][0]
    assert choice["text"] == "abc" + continuation("abc", 1)
    assert choice["logprobs"]["tokens"] == list(choice["text"])
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert None not in choice["logprobs"]["token_logprobs"][1:]
    assert len(choice["logprobs"]["token_logprobs"]) == len(prompt) + 1
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    scored = (await complete(app, prompt, echo=True, logprobs=1, max_tokens=0)).json()
    assert scored["choices"][0]["text"] == "abc"
    assert scored["usage"]["completion_tokens"] == 0
    expected = {name: column[:3] for name, column in choice["logprobs"].items()}
    assert scored["choices"][0]["logprobs"] == expected
    assert (await complete(app, "abc", echo=True, max_tokens=0)).json()["choices"][0]["text"] == "abc"


async def test_prompt_logprobs(app: ServerApp) -> None:
    """prompt_logprobs are vLLM's: per position a map from token id to logprob, rank and text."""
    body = (await complete(app, "ab", prompt_logprobs=1, max_tokens=1)).json()
    first, second = body["choices"][0]["prompt_logprobs"]
    assert first is None
    token = TOKENIZER.encode("b")[0]
    assert second[str(token)] == {"logprob": -token / 3, "rank": 2, "decoded_token": "b"}
    assert second[str(LETTERS[0])] == {"logprob": -0.5, "rank": 1, "decoded_token": "a"}


async def test_token_ids(app: ServerApp) -> None:
    """return_token_ids adds the ids of prompt and answer; tokens can be named by id in logprobs."""
    body = (
        await complete(app, max_tokens=2, return_token_ids=True, return_tokens_as_token_ids=True, logprobs=0)
    ).json()
    choice = body["choices"][0]
    assert TOKENIZER.decode(choice["token_ids"]) == choice["text"]
    assert choice["prompt_token_ids"] == list(ALL)
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]


STREAMED: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 30, "stop": [continuation("hello", 30)[20:23]]},
    {"n": 3, "temperature": 1, "seed": 5},
    {"prompt": ["a", "b", "c"], "n": 2, "temperature": 1, "seed": 5},
    {"echo": True, "logprobs": 1},
    {"logprobs": 2, "return_token_ids": True},
]


@pytest.mark.parametrize("fields", STREAMED)
async def test_a_stream_says_what_the_whole_answer_says(app: ServerApp, fields: dict[str, Any]) -> None:
    """Joined, the chunks of every choice are the whole answer: text, logprobs, ids, one finish reason, usage."""
    whole = (await complete(app, **fields)).json()
    streamed = await complete(app, **fields, stream=True, stream_options={"include_usage": True})
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert streamed.headers["cache-control"] == "no-cache"
    *chunks, usage, done = streamed.events()
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}
    usage["usage"].pop("prompt_tokens_details")  # the second time the prompt may be cached
    assert usage["usage"].items() <= whole["usage"].items()
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        assert parts[-1]["finish_reason"] is not None
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        if choice["logprobs"] is not None:
            for name, column in choice["logprobs"].items():
                assert [item for part in parts for item in part["logprobs"][name]] == column
        if "token_ids" in choice:
            assert [item for part in parts for item in part["token_ids"]] == choice["token_ids"]


async def test_usage_can_be_continuous(app: ServerApp) -> None:
    """continuous_usage_stats puts the counts so far into every chunk."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = (await complete(app, max_tokens=5, stream=True, stream_options=options)).events()
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 5
    plain = (await complete(app, max_tokens=2, stream=True)).events()
    assert all("usage" not in chunk for chunk in plain[:-1])


async def test_cached_tokens_are_reported(app: ServerApp) -> None:
    """The second request with the same beginning reports the blocks it found, and not across cache salts."""
    prompt = "a shared beginning of a prompt, longer than two blocks"

    async def cached(**fields: Any) -> int:
        body = (await complete(app, prompt, max_tokens=1, **fields)).json()
        return body["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [await cached(), await cached()] == [0, 48]
    assert [await cached(cache_salt="mine"), await cached(cache_salt="mine"), await cached()] == [0, 48, 48]


async def test_keys_share_no_cache(engine: Engine) -> None:
    """With several keys a request finds cached blocks of its own key only; with one key there is nothing to part."""
    prompt = "a shared beginning of a prompt, longer than two blocks"

    async def cached(app: ServerApp, key: str) -> int:
        body = {"prompt": prompt, "max_tokens": 1}
        answer = await ask(app, "POST", "/v1/completions", body, headers={"x-api-key": key})
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    two = create_app(engine, Config(auth=AuthConfig(api_keys=("one", "two"))))
    assert [await cached(two, "one"), await cached(two, "two"), await cached(two, "one")] == [0, 0, 48]


async def test_a_full_queue_is_a_503_at_once() -> None:
    """One request more than may wait is refused with the time to come back, and the others are answered."""
    worker = GatedWorker()
    async with (
        open_stub(worker=worker, max_batch_size=1, max_waiting_batches=1) as engine,
        trio.open_nursery() as nursery,
    ):
        app = create_app(engine, Config())
        for _ in range(2):
            nursery.start_soon(complete, app)
        await trio.testing.wait_all_tasks_blocked()
        answer = await ask(app, "POST", "/v1/completions", {"prompt": "x"})
        assert answer.status == 503
        assert answer.json()["error"]["code"] == "overloaded"
        assert answer.headers["retry-after"]
        worker.let(1000)


async def test_a_request_that_fails_in_the_model_is_a_500_of_its_own(app: ServerApp, runner: StubRunner) -> None:
    """A step that raises fails the request it is about, without the exception's text, and no other."""

    def poison(plan: Any) -> None:
        if any(tuple(TOKENIZER.encode("poison")) == a.token_ids[:6] for a in plan.admitted):
            raise RuntimeError("at 0x7f00 in /srv/model.py")

    runner.hook = poison
    answers: dict[str, Answer] = {}

    async def go(prompt: str) -> None:
        answers[prompt] = await ask(app, "POST", "/v1/completions", {"prompt": prompt, "max_tokens": 3})

    async with trio.open_nursery() as nursery:
        for prompt in ("good", "poison", "fine"):
            nursery.start_soon(go, prompt)
    assert answers["good"].json()["choices"][0]["text"] == continuation("good", 3)
    assert answers["fine"].json()["choices"][0]["text"] == continuation("fine", 3)
    assert answers["poison"].status == 500
    assert answers["poison"].json()["error"]["code"] == "request_failed"
    assert b"0x" not in answers["poison"].body
    assert b"/srv" not in answers["poison"].body


async def test_offsets_count_characters_of_the_text() -> None:
    """A token that is a part of a character begins where the character does; no offset is beyond the text."""
    async with open_stub(StubRunner()) as engine:
        body = {"prompt": "é🤗a", "max_tokens": 1, "echo": True, "logprobs": 0}
        answer = await ask(create_app(engine, Config()), "POST", "/v1/completions", body)
    choice = answer.json()["choices"][0]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 1, 2, 3]
    assert len(choice["text"]) == 4
