# %% [markdown]
# # Stepping the scheduler by hand
#
# An LLM server does the same thing over and over: **ask → reserve → plan → run → commit**. In a server four actors
# carry these messages. Here we carry them ourselves, one cell a verb, with the *real* scheduler, the *real* block
# manager and the *real* model runner that the server uses. Nothing is mocked, no event loop runs, and between two
# cells the engine stands still so that we can look at it.
#
# After this notebook you know what *paged KV cache*, *prefix caching*, *chunked prefill*, *continuous batching* and
# *preemption* are, because you will have seen each of them happen.

# %%
# %load_ext trio_llm.notebook
from functools import partial

from trio_llm.config import EngineConfig
from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.demo import demo_model_path
from trio_llm.messages import Finished, SamplingParams, Tokens
from trio_llm.model.load import load_runner
from trio_llm.notebook.pictures import draw_pool, draw_tables
from trio_llm.notebook.timeline import History, draw_budget, draw_timeline
from trio_llm.tokenizer import Tokenizer

# %% [markdown]
# ## The parts
#
# A transformer keeps a key and a value of every token it has read, in every layer: the **KV cache**. Without it, each
# new token would mean reading the whole text again. The cache is the server's scarcest memory, so it is cut into
# **blocks** of 16 tokens, like the pages of an operating system. We take a tiny pool, 20 blocks, so that it fits in a
# picture (and runs full).

# %%
runner = load_runner(EngineConfig(model=str(demo_model_path()), dtype="float32", num_kv_blocks=20))
tokenizer = Tokenizer.from_directory(demo_model_path())
blocks = BlockManager(num_blocks=20, groups=runner.info.kv_groups, secret=b"any key will do in a notebook")
scheduler = Scheduler(
    max_num_batched_tokens=32,
    max_batch_size=8,
    max_model_len=blocks.max_tokens(),
    eos_token_ids=runner.info.eos_token_ids,
)
decode = partial(tokenizer.decode, skip_special_tokens=False)
history = History(decode, budget_tokens=32)
answers: dict[int, list[int]] = {}
blocks

# %% [markdown]
# Each square is one block: room for the keys and values of 16 tokens. All are empty. The crossed-out one is the *null
# block*, which is never used: a safe place to point at.
#
# ## A request arrives
#
# A request is a list of token ids and the rules for choosing new ones. `temperature=0` always takes the likeliest.


# %%
def chat(question: str, system: str = "You are a helpful assistant.") -> list[int]:
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return tokenizer.encode(f"{text}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


greedy = SamplingParams(temperature=0, max_tokens=200)
prompt = chat("What is the capital of Japan?")
scheduler.submit(1, prompt, greedy)
print(len(prompt), "tokens:", [decode([token]) for token in prompt])
scheduler

# %% [markdown]
# ## Verb 1: ask
#
# The scheduler decides *who should run next, and in what order*. It knows tokens, but nothing of memory. So it asks
# the block manager: "these rows, in this order, at most 32 tokens in this step; can they have their blocks?"

# %%
ask = scheduler.ask()
ask

# %% [markdown]
# ## Verb 2: reserve
#
# The block manager looks for each row's tokens in its prefix cache (nothing there yet), takes blocks from the free
# list and says what was granted: the row computes the positions `0 → 26`, and their keys and values go to these blocks.

# %%
grant = blocks.reserve(ask)
grant

# %%
blocks

# %% [markdown]
# The request's colour marks the blocks it owns. The big number counts the owners of a block.
#
# ## Verb 3: plan
#
# The grant becomes a plan: one **ragged batch**. Rows may have different lengths, all their tokens lie in one flat
# list and run in *one* forward pass. `samples` says whether a new token can be drawn after this row, which is only
# true once the whole prompt has been read.

# %%
plan = scheduler.plan(grant)
plan

# %% [markdown]
# ## Verb 4: run
#
# The runner is the only part that knows the model. It computes keys, values and logits, and samples.

# %%
result = runner.step(plan)
result

# %% [markdown]
# ## Verb 5: commit
#
# The result goes back to the scheduler: positions count as computed, tokens are appended, requests may finish. Out
# come the events for the clients. That was one step.

# %%
commit = scheduler.commit(result)
history.add(scheduler, blocks, grant, plan, result)
commit

# %% [markdown]
# ## The same five verbs, as often as needed
#
# That is the whole engine. A function that does one step, and remembers it for the pictures:


# %%
def note(commit) -> None:
    """Do what clients do with their events: collect tokens, and show the answer when it is finished."""
    for request_id, event in commit.events:
        if isinstance(event, Tokens):
            answers.setdefault(request_id, []).extend(event.token_ids)
        elif isinstance(event, Finished):
            print(f"request {request_id} finished ({event.reason}): {tokenizer.decode(answers[request_id])}")


def run(grant) -> None:
    """Plan, run, commit and remember a step whose blocks are granted."""
    plan = scheduler.plan(grant)
    result = None
    if plan is not None:
        result = runner.step(plan)
        note(scheduler.commit(result))
    history.add(scheduler, blocks, grant, plan, result)


def step() -> bool:
    """Do one step; False when there is nothing left to do."""
    ask = scheduler.ask()
    if ask is not None:
        run(blocks.reserve(ask))
    return ask is not None


note(commit)
for _ in range(4):
    step()
draw_tables(scheduler.running, blocks, decode)

# %% [markdown]
# This is the request's **block table**: *logical* block 0, 1, 2… of the text on the left, *physical* blocks of the
# pool in the headings. The model finds token 20 in logical block 20 // 16 = 1, slot 20 % 16 = 4. Physical blocks need
# not be neighbours, so no memory is lost to gaps, and a text grows block by block, as it is written.
#
# The prompt was read in the *prefill* steps, many tokens at once. Since then each step is a *decode*: it reads the one
# token sampled before, and samples the next.

# %%
while step():
    pass
history.timeline()

# %% [markdown]
# ## Finished, but not forgotten: the prefix cache
#
# The request has ended and its blocks are free. But the dashed ones still hold keys and values, filed under a hash of
# *all* tokens up to their end. If a prompt begins with the same tokens, it can use them. Blocks are only really
# emptied when somebody needs the room, the least recently used first.

# %%
blocks

# %% [markdown]
# Two new requests with the same system prompt as before:

# %%
scheduler.submit(2, chat("What is the capital of Peru?"), greedy)
scheduler.submit(3, chat("What is the capital of Kenya?"), greedy)
grant = blocks.reserve(scheduler.ask())
grant

# %% [markdown]
# Both rows start after the tokens that were **found in the prefix cache**: they are not computed again. Now two
# requests own the same blocks; each has a reference count of 2. Shared blocks are full and never change, so
# sharing is safe without copying.

# %%
run(grant)
draw_pool(blocks, "Two requests share the beginning of their prompts")

# %%
while step():
    pass

# %% [markdown]
# ## Chunked prefill and continuous batching
#
# A long prompt must not make everybody else wait. We start a story, let it run for some steps, and then send a
# conversation that is longer than the token budget of a step (32).

# %%
first_step = len(history.moments)
scheduler.submit(4, chat("Tell me a story about a fox."), SamplingParams(temperature=0, max_tokens=24))
for _ in range(6):
    step()
earlier = "<|im_start|>user\nMy name is Ada and my favourite colour is green.<|im_end|>\n"
earlier += "<|im_start|>assistant\nNice to meet you, Ada!<|im_end|>\n"
scheduler.submit(5, tokenizer.encode(earlier) + chat("What is my favourite colour?", system=""), greedy)
while step():
    pass
moments = history.moments[first_step:]
draw_timeline(moments, "A long prompt comes while a story is being told")

# %%
draw_budget(moments, 32)

# %% [markdown]
# Look at the steps where both run: the pale bar at the bottom is the story's one decode token; it is served *first*, in
# every step. What is left of the budget goes to a **chunk** of the long prompt. So the story never stutters, and the
# long prompt still gets 31 tokens a step. Both run in the same forward pass: this is *continuous batching*. (Hover
# over a cell to see its tokens.)
#
# ## When memory runs out: preemption
#
# Three long stories need more blocks than there are.

# %%
for request_id, animal in ((6, "a bear"), (7, "an owl"), (8, "a cat")):
    scheduler.submit(request_id, chat(f"Tell me a story about {animal}."), greedy)
while all(cell.kind != "preempted" for cell in history.moments[-1].cells.values()):
    assert step()
preempted_at = len(history.moments) - 1
history.diff()

# %% [markdown]
# No block was free, so the request that came *last* lost all of its blocks (first come, first served). Nothing it said
# is lost: its tokens are kept, it goes back to the front of the queue, and its keys and values are computed again when
# there is room. What is still in the prefix cache need not even be computed.

# %%
while step():
    pass
moments = history.moments[preempted_at - 5 : preempted_at + 22]
draw_timeline(moments, "Three stories in a pool for two")

# %%
draw_budget(moments, 32)

# %% [markdown]
# The preempted story waited for room. Most of its blocks were still in the prefix cache, so that a step or two read
# what was missing, and it went on with the very next word. The proof that preemption changes nothing: alone in the
# pool, the request gives the same tokens. (We compute in float32. In bfloat16 the last bit of a sum depends on what
# else is in the batch, and where two words are equally likely that bit may decide.)

# %%
preempted = next(id for id, cell in history.moments[preempted_at].cells.items() if cell.kind == "preempted")
animal = {6: "a bear", 7: "an owl", 8: "a cat"}[preempted]
scheduler.submit(9, chat(f"Tell me a story about {animal}."), greedy)
while step():
    pass
assert answers[9] == answers[preempted]

# %% [markdown]
# ## A client that goes away
#
# `abort` may come at any time. The sequence leaves the batch, and with the next ask its blocks go back.

# %%
scheduler.submit(10, chat("Count from 1 to 12."), greedy)
for _ in range(5):
    step()
scheduler.abort(10)
while step():
    pass
print(scheduler, blocks, sep="\n")
assert all(state.state != "used" for state in blocks.blocks())

# %% [markdown]
# ## What you have seen
#
# | idea | what it is here |
# |---|---|
# | paged KV cache | a block table per request, pointing into one pool |
# | prefix caching | full blocks filed under the hash of all tokens before them, shared by reference count |
# | chunked prefill | a long prompt, cut to what the step's token budget leaves |
# | continuous batching | decodes and chunks of many requests in one forward pass |
# | preemption | the last request gives up its blocks and is computed again later |
#
# `trio_llm/core/scheduler.py` and `trio_llm/core/block_manager.py` are what ran here: pure state machines without a
# clock, a thread or a GPU in sight. Change one, restart this notebook, and watch what happens.

# %%
runner.close()
