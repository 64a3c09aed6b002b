"""What two steps in flight are worth beside one: `python benchmarks/overlap.py [MODEL ...]`.

Each round serves the same requests with one step in flight and with two, in turn, so that whatever else the machine
does meanwhile hits both alike. A ratio is that of one round; the table has medians of the rounds and their ranges.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import trio
from models import spread

from trio_llm import Config, SamplingParams, open_engine
from trio_llm.config import EngineConfig
from trio_llm.demo import demo_model_path
from trio_llm.engine import Engine
from trio_llm.params import Submission

PROMPT_TOKENS = 32
# A Qwen3 of 101 MB in float32; its weights are random.
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def write_shape(directory: Path) -> Path:
    """Write the configuration of the larger model; it has the demo model's vocabulary."""
    demo = json.loads((demo_model_path() / "config.json").read_text())
    kept = {key: demo[key] for key in ("vocab_size", "eos_token_id", "bos_token_id") if key in demo}
    (directory / "config.json").write_text(json.dumps({**SHAPE, **kept}))
    return directory


def settings(model: Path, *, ahead: bool) -> Config:
    """Return how a model is served."""
    dummy = not list(model.glob("*.safetensors"))
    return Config(
        engine=EngineConfig(
            model=str(model),
            tokenizer=str(demo_model_path()),
            load_format="dummy" if dummy else "auto",
            num_kv_blocks=1024,
            enable_prefix_caching=False,
            async_scheduling=ahead,
        )
    )


async def serve(engine: Engine, num_clients: int, num_tokens: int) -> tuple[float, float]:
    """Return tokens a second, and the median time to the first token in ms of clients that come one after another."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    first_s: list[float] = []

    async def ask(at: int) -> None:
        await trio.sleep(0.01 * at)
        asked = time.perf_counter()
        async with engine.open_stream(
            Submission([5 + (at * 7 + i) % 200 for i in range(PROMPT_TOKENS)], params)
        ) as stream:
            await stream.__anext__()
            first_s.append(time.perf_counter() - asked)
            async for _ in stream:
                pass

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for at in range(num_clients):
            nursery.start_soon(ask, at)
    return num_clients * num_tokens / (time.perf_counter() - began), 1e3 * statistics.median(first_s)


async def measure(model: Path, num_clients: int, num_tokens: int, rounds: int) -> list[list[tuple[float, float]]]:
    """Return per round what one step in flight gives, and two."""
    results: list[list[tuple[float, float]]] = []
    async with open_engine(settings(model, ahead=False)) as one, open_engine(settings(model, ahead=True)) as two:
        for engine in (one, two):
            await serve(engine, num_clients, 4)
        for number in range(rounds):
            order = (one, two) if number % 2 == 0 else (two, one)
            found = {engine: await serve(engine, num_clients, num_tokens) for engine in order}
            results.append([found[one], found[two]])
    return results


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="default: the demo model and a random one of 100 MB")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of each client")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}; {given.rounds} rounds")
    print("| model | clients | tokens/s, 1 step | 2 steps | ratio | TTFT ms, 1 step | 2 steps | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for model in given.models or [demo_model_path(), write_shape(Path(directory))]:
            for num_clients in given.clients:
                rows = trio.run(measure, model, num_clients, given.tokens, given.rounds)
                columns = [spread([row[which][what] for row in rows], 0) for what in (0, 1) for which in (0, 1)]
                ratios = [spread([row[1][what] / row[0][what] for row in rows], 2) for what in (0, 1)]
                name = model.name if given.models or model == demo_model_path() else "100 MB, random"
                cells = [name, str(num_clients), *columns[:2], ratios[0], *columns[2:], ratios[1]]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
