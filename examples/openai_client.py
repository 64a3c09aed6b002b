"""Chat with a server through OpenAI's Python client, whole and as a stream."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
    api_key=os.environ.get("VLLM_API_KEY", "none"),
)
model = client.models.list().data[0].id

answer = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "What is the capital of Japan?"}], temperature=0
)
print(answer.choices[0].message.content)
assert answer.usage is not None
print(answer.usage.prompt_tokens, "tokens in,", answer.usage.completion_tokens, "out")

stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Tell me a story about a fox."}], max_tokens=64, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
