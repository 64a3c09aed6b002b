"""Use the engine inside a Trio program: two prompts at once, their tokens as they come, and a time limit."""

import trio

from trio_llm import Config, SamplingParams, open_engine
from trio_llm.config import EngineConfig
from trio_llm.engine import Engine
from trio_llm.params import Submission


async def tell(engine: Engine, prompt: str) -> None:
    """Print a continuation piece by piece. Leaving the block early frees the request's blocks within a step."""
    submission = Submission(engine.tokenizer.encode(prompt), SamplingParams(temperature=0, max_tokens=24))
    async with engine.open_stream(submission) as stream:
        async for delta in stream:
            print(f"{prompt!r} + {delta.text!r}")


async def main() -> None:
    """Open an engine for the length of a block."""
    async with open_engine(Config(engine=EngineConfig(num_kv_blocks=256))) as engine:
        print(engine.info.name, "on", engine.info.num_kv_blocks, "blocks")
        with trio.move_on_after(60):
            async with trio.open_nursery() as nursery:
                for prompt in ("Once upon a time", "The little owl"):
                    nursery.start_soon(tell, engine, prompt)


trio.run(main)
