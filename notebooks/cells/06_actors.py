# %% [markdown]
# # Actors, channels, cancellation: an engine that lives
#
# The notebooks before stepped the engine by hand. In a server it runs by itself, while clients come, listen and go. It is made of
# four **actors**: tasks that share nothing and send each other messages. This notebook keeps one alive across its cells.
#
# ![The step loop](../docs/step-loop.svg)

# %%
from functools import partial
from itertools import islice

import trio

from trio_llm.assemble import open_engine
from trio_llm.bridge import Bridge
from trio_llm.config import Config, EngineConfig
from trio_llm.demo import demo_model_path
from trio_llm.errors import InvalidRequestError
from trio_llm.notebook.stepper import chat
from trio_llm.notebook.timeline import draw_timeline, moments_of
from trio_llm.params import SamplingParams, Submission

settings = EngineConfig(model=str(demo_model_path()), num_kv_blocks=129, max_num_batched_tokens=64)
bridge = Bridge(partial(open_engine, Config(engine=settings)))
engine = bridge.value
bridge.call_sync(engine.health)

# %% [markdown]
# A cell runs and ends; an engine must not. The **bridge** keeps a Trio run in a thread of its own, and carries calls in and values
# out. What lives in there? Trio knows all its tasks, as a tree: each task has a parent, which does not end before it.


# %%
def tree() -> list[str]:
    """Return the tasks of this Trio run, each under its parent."""
    lines: list[str] = []

    def walk(task: trio.lowlevel.Task, depth: int) -> None:
        lines.append("  " * depth + task.name.rpartition("trio_llm.")[2])
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                walk(child, depth + 1)

    root = trio.lowlevel.current_root_task()
    assert root is not None
    walk(root, 0)
    return lines


tasks = bridge.call_sync(tree)
print(*tasks, sep="\n")
assert all(
    any(name in task for task in tasks) for name in ("SchedulerActor", "manage_blocks", "StepPipeline", "Metrics")
)

# %% [markdown]
# The four at the end of `_supervise` are the actors. Each one loops: it waits for a message, does one thing, sends one message.
#
# | actor | receives | sends |
# |---|---|---|
# | `SchedulerActor.run` | requests, grants, results | asks, plans, and tokens to the clients |
# | `manage_blocks` | an ask | a grant |
# | `StepPipeline.run` | a plan | a result, computed in a thread, so that this one stays free |
# | `Metrics.run` | statistics of steps and requests | nothing |
#
# No locks: only the scheduler's actor touches the scheduler, only `manage_blocks` the blocks. If one of the four fails, its parent
# tells the clients, cancels the others and raises the error; no part of an engine lives on without the rest.
#
# ## A client
#
# A client opens a stream and reads pieces of text as they come. `bridge.iterate` makes a plain Python loop of it.


# %%
async def listen(question: str, params: SamplingParams, put) -> None:
    submission = Submission(tuple(engine.tokenizer.encode(chat(question))), params)
    async with engine.open_stream(submission) as deltas:
        async for delta in deltas:
            put(delta)


greedy = SamplingParams(temperature=0, max_tokens=200)
pieces = []
for delta in bridge.iterate(partial(listen, "Make JSON for a fox named Ada, age 5.", greedy)):
    pieces.append(delta)
    print(delta.token_ids, repr(delta.text))
print(pieces[-1].finish_reason, pieces[-1].usage)

# %% [markdown]
# ## Many clients
#
# Three clients in one nursery, each with its own stream. They know nothing of each other, and share the engine's steps.


# %%
async def together(questions: list[str], put) -> None:
    async with trio.open_nursery() as nursery:
        for number, question in enumerate(questions):
            nursery.start_soon(listen, question, greedy, lambda delta, number=number: put((number, delta.text)))


questions = ["What is the capital of Cuba?", "Count from 1 to 12.", "Who are you?"]
answers = dict.fromkeys(range(3), "")
arrivals = []
for number, text in bridge.iterate(partial(together, questions)):
    answers[number] += text
    arrivals.append(number)
print("pieces arrive from client", *arrivals)
print(*answers.values(), sep="\n")
assert len(set(arrivals[:12])) > 1, "they are served together"

# %%
moments = moments_of(bridge.call_sync(lambda: list(engine.trace)))
shared = [moment for moment in moments if moment.cells.keys() & {2, 3, 4}]
draw_timeline(shared, "Three clients of a live engine")

# %% [markdown]
# ## A client that leaves
#
# A reader closes the page in the middle of a story of 900 tokens. Nobody wants the rest, so it must not be computed. In Trio that
# needs no code in the engine's loop. Leaving the `for` cancels the client's task; the cancellation leaves its `async with`; that
# sends an `Abort` to the scheduler's actor; and the next ask gives the blocks back.


# %%
def state() -> str:
    health = bridge.call_sync(engine.health)
    calls = sum("Bridge._perform" in task for task in bridge.call_sync(tree)) - 1  # this one
    return f"{health.num_running} running, tasks of clients: {calls}"


endless = SamplingParams(temperature=0.8, seed=1, max_tokens=900, ignore_eos=True)
story = bridge.iterate(partial(listen, "Tell me a story about an owl.", endless))
print("".join(delta.text for delta in islice(story, 8)), "…")
print("while it listens:", state())
assert state() == "1 running, tasks of clients: 1"
story.close()
bridge.call(engine.wait_idle)
print("after it left:   ", state())
assert state() == "0 running, tasks of clients: 0"

# %% [markdown]
# ## A client that cannot wait
#
# A deadline is the same mechanism. The client says how long it is willing to listen, in a scope around its own code; the engine
# knows nothing of it. Here the scope ends after five pieces, and a second client, who came at the same time, is not disturbed:


# %%
async def impatient(put) -> None:
    with trio.CancelScope() as scope:  # or trio.move_on_after(seconds)
        count = iter(range(4, -1, -1))
        await listen("Tell me a story about a fox.", greedy, lambda _: next(count) or scope.cancel())
    assert scope.cancelled_caught


async def both(put) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(impatient, put)
        nursery.start_soon(listen, "Count from 1 to 12.", greedy, put)


first = max(moment.step for moment in moments_of(bridge.call_sync(lambda: list(engine.trace)))) + 1
counted = "".join(delta.text for delta in bridge.iterate(both))
print(counted)
assert counted == answers[1], "the same answer as before"
bridge.call(engine.wait_idle)
last = [moment for moment in moments_of(bridge.call_sync(lambda: list(engine.trace))) if moment.step >= first]
draw_timeline(last, "One client leaves after five tokens, the other stays")

# %% [markdown]
# ## A request that can never be served
#
# It is refused at once, with the reason and before anything is queued. The engine goes on.

# %%
try:
    bridge.call_sync(engine.open_stream, Submission((1,) * 5000, greedy))
except InvalidRequestError as error:
    print(type(error).__name__, "-", error)

# %% [markdown]
# ## The end
#
# `close` cancels the root of the tree. Every task ends, its parent after it; open streams are aborted, the model's memory is freed,
# the thread ends. The code: `trio_llm/engine/supervisor.py` (the tree) and `actors.py` (the loops).

# %%
bridge.close()
