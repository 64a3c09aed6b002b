"""What each client library does against a running server; run by run.py in the environment where they are installed.

    python tests/compat/checks.py NAME BASE_URL MODEL REFERENCE.json

Prints the library's version; an exception is a failure. Nothing here imports trio_llm.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import sys
from typing import Any
from urllib.parse import urlsplit

QUESTION = "What is the capital of Japan?"
ANSWER = "The capital of Japan is Tokyo."
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
CAPITAL = {
    "type": "object",
    "properties": {"city": {"enum": ["Tokyo", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def openai(url: str, model: str, reference: Any) -> None:
    """Models, chat whole and streamed, a form of output, log-probabilities, embeddings, a batch, a response."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    assert client.models.list().data[0].id == model
    whole = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0)
    assert whole.choices[0].message.content == ANSWER
    chunks = list(
        client.chat.completions.create(
            model=model, messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage == whole.usage
    form: Any = {"type": "json_schema", "json_schema": {"name": "capital", "schema": CAPITAL, "strict": True}}
    formed = client.chat.completions.create(model=model, messages=MESSAGES, response_format=form, temperature=0)
    assert json.loads(formed.choices[0].message.content or "")["city"] in {"Tokyo", "Paris"}
    scored = client.completions.create(model=model, prompt="Once upon", max_tokens=3, logprobs=2, temperature=0)
    assert scored.choices[0].logprobs is not None and len(scored.choices[0].logprobs.tokens or ()) == 3
    vectors = client.embeddings.create(model=model, input=["one", "two"]).data
    assert len(vectors) == 2 and len(vectors[0].embedding) > 8
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 1}}
    file = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    while batch.status not in {"completed", "failed"}:
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed" and batch.output_file_id is not None
    assert b'"custom_id":"a"' in client.files.content(batch.output_file_id).content
    response = client.responses.create(model=model, input=QUESTION, temperature=0)
    assert response.output_text == ANSWER
    try:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "long " * 5000}])
    except openai.BadRequestError as error:
        refusal = error.code
    else:
        refusal = "none"
    assert refusal == "context_length_exceeded"


def anthropic(url: str, model: str, reference: Any) -> None:
    """A message whole and streamed by the SDK's own helper, and a count of tokens."""
    import anthropic

    client = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)
    # Its newest version has no argument for the temperature any more.
    asked: Any = {"model": model, "messages": MESSAGES, "max_tokens": 50, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**asked)
    assert [block.text for block in whole.content if block.type == "text"] == [ANSWER]
    assert whole.stop_reason == "end_turn"
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == ANSWER
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
    assert client.messages.count_tokens(model=model, messages=MESSAGES).input_tokens == whole.usage.input_tokens


def litellm(url: str, model: str, reference: Any) -> None:
    """Chat whole and streamed, an embedding, and a prompt that is too long, as the error of its own that it makes."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    common: Any = {"api_base": url, "api_key": "none", "num_retries": 0}
    whole: Any = litellm.completion(f"openai/{model}", MESSAGES, temperature=0, **common)
    assert whole.choices[0].message.content == ANSWER
    chunks: Any = litellm.completion(f"hosted_vllm/{model}", MESSAGES, temperature=0, stream=True, **common)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    vectors: Any = litellm.embedding(f"openai/{model}", ["one", "two"], **common)
    assert len(vectors.data) == 2
    try:
        litellm.completion(f"openai/{model}", [{"role": "user", "content": "long " * 5000}], **common)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("a prompt that is too long was accepted")


def langchain(url: str, model: str, reference: Any) -> None:
    """ChatOpenAI whole, streamed and in a form; OpenAIEmbeddings."""
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    common: Any = {"base_url": url, "api_key": "none", "model": model, "max_retries": 0}
    chat = ChatOpenAI(**common, temperature=0)
    whole = chat.invoke(QUESTION)
    assert whole.content == ANSWER
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] > 0
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTION)) == ANSWER
    formed = chat.with_structured_output({"title": "capital", **CAPITAL}, method="json_schema").invoke(QUESTION)
    assert isinstance(formed, dict) and formed["city"] in {"Tokyo", "Paris"}
    vectors = OpenAIEmbeddings(**common, check_embedding_ctx_length=False).embed_documents(["one", "two"])
    assert len(vectors) == 2


def instructor(url: str, model: str, reference: Any) -> None:
    """An object by a tool, by a schema, by a strict tool and by the Responses API."""
    from typing import Literal

    import instructor
    import openai
    import pydantic

    city = Literal["Tokyo", "Paris"]
    capital = pydantic.create_model("Capital", city=(city, ...))
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    for mode in ("TOOLS", "JSON_SCHEMA", "TOOLS_STRICT", "RESPONSES_TOOLS"):
        asked = instructor.from_openai(client, mode=instructor.Mode[mode]).chat.completions.create
        answer: Any = asked(model=model, response_model=capital, messages=MESSAGES, max_retries=0)
        assert answer.city in {"Tokyo", "Paris"}, mode


def pydantic_ai(url: str, model: str, reference: Any) -> None:
    """An agent over chat and over responses: a text, and an object by a tool."""
    from typing import Literal

    import pydantic
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    city = Literal["Tokyo", "Paris"]
    capital = pydantic.create_model("Capital", city=(city, ...))
    provider = OpenAIProvider(base_url=url, api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        served: Any = kind(model, provider=provider)
        assert Agent(served).run_sync(QUESTION, model_settings={"temperature": 0}).output == ANSWER
        formed: Any = Agent(served, output_type=capital).run_sync(QUESTION).output
        assert formed.city in {"Tokyo", "Paris"}


def llama_index(url: str, model: str, reference: Any) -> None:
    """OpenAILike: chat whole and streamed, and a completion."""
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    common: Any = {"model": model, "api_base": url, "api_key": "none", "temperature": 0, "max_retries": 0}
    chat = OpenAILike(**common, is_chat_model=True)
    messages = [ChatMessage(role="user", content=QUESTION)]
    assert chat.chat(messages).message.content == ANSWER
    assert "".join(chunk.delta or "" for chunk in chat.stream_chat(messages)) == ANSWER
    assert OpenAILike(**common, is_chat_model=False, max_tokens=4).complete("Once upon").text


def lm_eval(url: str, model: str, reference: Any) -> None:
    """`local-completions` scores continuations as transformers does, with the server's own tokenizer."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(
        model=model,
        base_url=f"{url}/completions",
        tokenizer_backend="remote",
        tokenized_requests=True,
        num_concurrent=1,
        max_retries=1,
    )
    requests = [
        Instance("loglikelihood", {}, (score["context"], score["continuation"]), index)
        for index, score in enumerate(reference)
    ]
    for (told, greedy), score in zip(lm.loglikelihood(requests), reference, strict=True):
        assert abs(told - score["logprob"]) < 1e-3, (told, score)
        assert greedy == score["greedy"], score


def vllm_bench(url: str, model: str, reference: Any) -> None:
    """The two requests that `vllm bench serve` sends, and the figures that it takes out of the streams."""
    common = {
        "model": model,
        "repetition_penalty": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    completion = {**common, "prompt": "Once upon a time", "max_tokens": 16, "logprobs": None}
    chat = {**common, "messages": parts, "max_completion_tokens": 16}
    for path, body in (("/completions", completion), ("/chat/completions", chat)):
        headers = {"Content-Type": "application/json", "Authorization": "Bearer None", "x-request-id": "bench-0"}
        target = urlsplit(url)
        connection = http.client.HTTPConnection(target.netloc)
        connection.request("POST", target.path + path, json.dumps(body), headers)
        answer = connection.getresponse()
        assert answer.status == 200 and answer.getheader("x-request-id") == "bench-0"
        first, tokens, usage_seen = None, 0, False
        messages = [part for part in answer.read().decode().split("\n\n") if part and not part.startswith(":")]
        assert messages[-1] == "data: [DONE]"
        for message in messages[:-1]:
            chunk = json.loads(message.removeprefix("data: "))
            if choices := chunk.get("choices"):
                first = first or choices[0].get("text") or choices[0].get("delta", {}).get("content")
            elif usage := chunk.get("usage"):
                tokens, usage_seen = usage["completion_tokens"], True
        assert usage_seen and tokens == 16 and first


CHECKS = {
    "openai": openai,
    "anthropic": anthropic,
    "litellm": litellm,
    "langchain-openai": langchain,
    "instructor": instructor,
    "pydantic-ai-slim": pydantic_ai,
    "llama-index-llms-openai-like": llama_index,
    "lm_eval": lm_eval,
    "vllm-bench-format": vllm_bench,
}


def main() -> None:
    """Run one check and print the version of what it used."""
    name, url, model, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:  # noqa: PTH123 - it also runs where pathlib would be no shorter
        reference = json.load(file)
    CHECKS[name](url, model, reference)
    version = "-" if name == "vllm-bench-format" else importlib.metadata.version(name)
    sys.stdout.write(f"\nversion {version}\n")


if __name__ == "__main__":
    main()
