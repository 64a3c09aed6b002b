# %% [markdown]
# # A live engine across cells
#
# In a server the engine runs all the time: clients come, read their answers as they are written, and sometimes hang
# up. A notebook cell, on the other hand, runs and ends. The **bridge** holds the two together: it keeps a Trio run,
# with the whole engine in it, in a thread of its own, and carries calls in and values out.

# %%
from functools import partial
from itertools import islice

from trio_llm.assemble import open_engine
from trio_llm.config import Config, EngineConfig
from trio_llm.messages import SamplingParams
from trio_llm.notebook.bridge import Bridge
from trio_llm.notebook.timeline import draw_budget, draw_timeline, moments_of

settings = EngineConfig(num_kv_blocks=64, max_num_batched_tokens=64)
bridge = Bridge(partial(open_engine, Config(engine=settings)))
engine = bridge.value
bridge.call_sync(engine.health)

# %% [markdown]
# The engine is alive now, and stays so between the cells: four actors (scheduler, KV manager, model runner, metrics),
# each one a Trio task, waiting for work.
#
# ## Streaming
#
# A client opens a stream and reads pieces of text as they come. `bridge.iterate` turns that into a plain Python loop.


# %%
def chat(question: str) -> list[int]:
    return engine.tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


async def stream(question: str, params: SamplingParams, put) -> None:
    async with engine.open_stream(chat(question), params) as deltas:
        async for delta in deltas:
            put(delta)


greedy = SamplingParams(temperature=0, max_tokens=200)
for delta in bridge.iterate(partial(stream, "Tell me a story about a fox.", greedy)):
    print(delta.text, end="")
print(f"\n\n{delta.finish_reason}, {delta.usage}")

# %% [markdown]
# ## Several clients at the same time
#
# Three clients in one nursery, each reading its own stream. They share the engine's steps; their answers arrive
# interleaved.

# %%
import trio


async def three_clients(put) -> None:
    async def client(number: int, question: str) -> None:
        async with engine.open_stream(chat(question), greedy) as deltas:
            async for delta in deltas:
                put((number, delta.text))

    async with trio.open_nursery() as nursery:
        for number, question in enumerate(
            ["What is the capital of Cuba?", "Make JSON for a fox named Ada, age 5.", "Who are you?"]
        ):
            nursery.start_soon(client, number, question)


answers = ["", "", ""]
arrivals = []
for number, text in bridge.iterate(three_clients):
    answers[number] += text
    arrivals.append(number)
print("order of arrival:", arrivals)
print(*answers, sep="\n")

# %% [markdown]
# The engine remembers its last steps. The same pictures as in the notebook before, now of a running engine: rows of
# several requests in one step, prefill in full colour, decodes pale.

# %%
moments = moments_of(bridge.call_sync(lambda: list(engine.trace)))
shared = [moment for moment in moments if moment.cells.keys() & {2, 3, 4}][:26]
draw_timeline(shared, "Three clients of a live engine")

# %%
draw_budget(shared, settings.max_num_batched_tokens)

# %% [markdown]
# ## A client that hangs up
#
# This client wants a long story, reads five pieces and goes away. Leaving the loop closes the iterator; that cancels
# the client's task; leaving its `async with` block sends an abort; and within one step the sequence is out of the
# batch and its blocks are free. Nobody else notices.


# %%
def metric(name: str) -> float:
    text = bridge.call(engine.render_metrics).decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


endless = SamplingParams(temperature=0.8, seed=1, max_tokens=900, ignore_eos=True)
pieces = bridge.iterate(partial(stream, "Tell me a story about an owl.", endless))
print("".join(delta.text for delta in islice(pieces, 5)), "…")
print(
    f"while it runs: {metric('vllm:num_requests_running'):.0f} running, {metric('vllm:kv_cache_usage_perc'):.1%} of the pool owned"
)
pieces.close()
bridge.call(engine.wait_idle)
print(
    f"hung up:       {metric('vllm:num_requests_running'):.0f} running, {metric('vllm:kv_cache_usage_perc'):.1%} of the pool owned"
)

# %% [markdown]
# ## Wrong questions
#
# A request that can never be served is refused at once, before anything is queued, and says why. The engine lives on.

# %%
try:
    bridge.call_sync(engine.open_stream, [1] * 5000, greedy)
except Exception as error:
    print(type(error).__name__, "-", error)

# %% [markdown]
# ## The end
#
# `close` leaves the engine's block: what still runs is aborted, the thread ends, the memory is free.

# %%
bridge.close()
