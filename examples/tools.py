"""A model that calls a function of yours: run what it calls, send it the result, and repeat until it answers."""

import json
import os

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
    api_key=os.environ.get("VLLM_API_KEY", "none"),
)
model = client.models.list().data[0].id


def get_weather(city: str) -> str:
    """Look up the weather in a table."""
    return json.dumps({"Paris": {"temperature": 21, "sky": "sunny"}}[city])


TOOLS: list[ChatCompletionToolParam] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather in Paris?"}]

while True:
    answer = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0)
    message = answer.choices[0].message
    messages.append(message.to_dict())  # type: ignore[arg-type]
    if not message.tool_calls:
        break
    for call in message.tool_calls:
        assert call.type == "function"
        result = get_weather(**json.loads(call.function.arguments))
        print(f"{call.function.name}({call.function.arguments}) -> {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
print(message.content)
