"""Ask a server many questions at once from Trio, and show each answer as soon as it is there."""

import os

import trio
from openai import AsyncOpenAI

CITIES = ["France", "Italy", "Spain", "Japan", "Egypt", "Norway"]


async def ask(client: AsyncOpenAI, model: str, country: str) -> None:
    """Ask one question."""
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": f"What is the capital of {country}?"}], temperature=0
    )
    print(f"{country}: {answer.choices[0].message.content}")


async def main() -> None:
    """Ask all of them; leaving the nursery waits for the last answer, Ctrl-C cancels every request."""
    base_url = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1")
    async with AsyncOpenAI(base_url=base_url, api_key=os.environ.get("VLLM_API_KEY", "none")) as client:
        model = (await client.models.list()).data[0].id
        async with trio.open_nursery() as nursery:
            for country in CITIES:
                nursery.start_soon(ask, client, model, country)


trio.run(main)
