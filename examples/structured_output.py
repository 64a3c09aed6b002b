"""Answers in a form that a program can rely on: JSON of a schema, a pattern, one of several words."""

import json
import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
    api_key=os.environ.get("VLLM_API_KEY", "none"),
)
model = client.models.list().data[0].id

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Make JSON for an owl named Zoe, age 7."}],
    temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}},
)
animal = json.loads(answer.choices[0].message.content or "")
print(animal["name"], "is", animal["age"])

# Beyond OpenAI's API, as in vLLM: a regular expression, a choice, or a grammar.
for form in ({"regex": "The capital of Japan is [A-Z][a-z]+[.]"}, {"choice": ["Tokyo", "Paris", "Rome"]}):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of Japan?"}],
        temperature=0,
        extra_body={"structured_outputs": form},
    )
    print(answer.choices[0].message.content)
