"""Upload a file of requests, have it answered in the background, and fetch the answers."""

import json
import os
import time

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
    api_key=os.environ.get("VLLM_API_KEY", "none"),
)
model = client.models.list().data[0].id

lines = [
    {
        "custom_id": country,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": model,
            "messages": [{"role": "user", "content": f"What is the capital of {country}?"}],
            "temperature": 0,
        },
    }
    for country in ("France", "Italy", "Japan", "Norway")
]
text = "\n".join(json.dumps(line) for line in lines)
file = client.files.create(file=("requests.jsonl", text.encode()), purpose="batch")
batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")

while batch.status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(0.1)
    batch = client.batches.retrieve(batch.id)
print(batch.status, batch.request_counts)

assert batch.output_file_id is not None
for line in client.files.content(batch.output_file_id).text.splitlines():
    answer = json.loads(line)
    print(answer["custom_id"], "->", answer["response"]["body"]["choices"][0]["message"]["content"])
