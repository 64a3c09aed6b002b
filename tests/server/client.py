"""The real openai client against a server under test, in a thread beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import openai
import trio

from tests.server.helpers import Running

T = TypeVar("T")


async def use_client(server: Running, use: Callable[[openai.OpenAI], T], key: str = "none") -> T:
    """Call `use` with a synchronous client of the server."""

    def work() -> T:
        plain = openai.DefaultHttpxClient(verify=False, trust_env=False)  # reading certificates takes half a second
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0, http_client=plain) as client:
            return use(client)

    return await trio.to_thread.run_sync(work)
