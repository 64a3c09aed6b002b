# %% [markdown]
# # Paged KV: where a text lives while it is written
#
# A transformer computes a *key* and a *value* for every token, in every layer. All later tokens look back at them. So a
# server keeps them, or each new token would need the whole text again. This **KV cache** is the scarcest memory of a
# server. Here you watch the real scheduler, block manager and model divide it among requests.

# %%
# %load_ext trio_llm.notebook
from IPython.display import display

from trio_llm.notebook import show_texts
from trio_llm.notebook.charts import new_chart, picture
from trio_llm.notebook.pictures import draw_pool, draw_tables
from trio_llm.notebook.stepper import Stepper, chat
from trio_llm.notebook.tokens import draw_tokens

engine = Stepper(num_kv_blocks=32, max_num_batched_tokens=64)
show_texts(engine.tokenizer.decode)
engine.blocks

# %% [markdown]
# The memory is cut into **blocks**, like the pages of an operating system. One block has room for the keys and values of
# 16 tokens, so these 31 blocks hold 496 tokens. All are empty. Block 0, crossed out, is never used: a safe place to point at.
#
# ## A request is a list of tokens
#
# The model does not see letters. It sees **token ids**, numbers from a fixed list. Here is a request in the form that the demo
# model was trained on, 16 tokens to a row: each row will fill one block.

# %%
first = engine.submit(chat("Count from 1 to 12.", system="You are a helpful assistant."))
[waiting] = engine.scheduler.waiting
draw_tokens(waiting.tokens, engine.decode, f"Request {first}: {len(waiting.tokens)} tokens", row_tokens=16)

# %% [markdown]
# ## A step, verb by verb
#
# A server repeats one step: **ask → reserve → plan → run → commit**. Between two cells the engine stands still.
#
# **Ask.** The scheduler chooses the rows of the step. It counts tokens and knows nothing of memory. So it asks for it.

# %%
engine.ask()

# %% [markdown]
# **Reserve.** The block manager takes blocks from its free list: 27 tokens need two. `table[0:] = [1, 2]` says that the
# request's block table now begins with blocks 1 and 2.

# %%
display(engine.reserve(), engine.blocks)

# %% [markdown]
# **Plan** and **run.** The plan is all that the model gets: tokens, their positions, and the new blocks. It computes 27 keys
# and values, writes them into blocks 1 and 2, and *samples* the token that comes next.

# %%
display(engine.plan(), engine.run())

# %% [markdown]
# **Commit.** The scheduler appends the new token to the request and tells its client. That was one step.

# %%
engine.commit()

# %% [markdown]
# ## The block table
#
# `engine.step()` does the same five verbs. The first step read the whole prompt (the **prefill**). From now on each step
# reads only the newest token and samples the next (a **decode**). Soon the second block is full,
# and the request needs a third one:

# %%
engine.steps(10)
draw_tables(engine.scheduler.running, engine.blocks, engine.decode)

# %% [markdown]
# From left to right this is the text: *logical* blocks 0, 1, 2. The headings are *physical* blocks, the places in the pool.
# The bar at the bottom shows how many of the 16 slots are computed. To find the key of any token, the model needs one
# division:

# %%
[sequence] = engine.scheduler.running
[table] = engine.blocks.tables(first)
for position in (0, 20, 32):
    block, slot = table[position // 16], position % 16
    token = sequence.tokens[position]
    print(f"position {position:2}: token {token:4} {engine.decode([token])!r:9} block {block}, slot {slot:2}")
assert len(table) == -(-len(sequence.tokens) // 16), "a block for every 16 tokens, and no more"

# %% [markdown]
# ## Why not one piece of memory per request?
#
# Because nobody knows how long an answer becomes. Three clients ask for stories, one after the other. Each of them may get
# up to 200 tokens.

# %%
engine.finish()
for seed, animal in ((2, "a fox"), (3, "an owl"), (4, "a bear")):
    engine.submit(chat(f"Tell me a story about {animal}."), temperature=0.7, seed=seed)
    engine.steps(25)
draw_pool(engine.blocks, "Three stories grow in one pool")

# %% [markdown]
# The colours are mixed: each request took its next block when it needed one, wherever that was. Two blocks next to each other
# may belong to different texts, and a text may jump. Its table keeps the order. (The dashed blocks
# of the first request are free again. `03_prefix_caching` shows what they are still good for.)

# %%
tables = {one.request_id: engine.blocks.tables(one.request_id)[0] for one in engine.scheduler.running}
for request_id, table in tables.items():
    print(f"request {request_id}: blocks {list(table)}")
    assert list(table) != list(range(table[0], table[0] + len(table))), "its blocks are not one piece"

# %% [markdown]
# What does this save? We run the stories to their end. After each step we count three things: the tokens that are stored, the
# slots of the blocks that hold them, and the slots that *one piece per request* would need, because it must be as long as the
# answer may become (prompt + 200).

# %%
stored, paged, pieces = [], [], []
while engine.step():
    running = engine.scheduler.running
    stored.append(sum(one.computed for one in running))
    paged.append(sum(16 * len(engine.blocks.tables(one.request_id)[0]) for one in running))
    pieces.append(sum(len(one.prompt) + 200 for one in running))
    assert paged[-1] - stored[-1] <= 16 * len(running), "at most one block per request is not full"

[axes] = new_chart("Memory of the three stories", x="step", y="slots for a token")
axes.plot(pieces, label="one piece for each request", drawstyle="steps-post")
axes.plot(paged, label="blocks of 16", drawstyle="steps-post")
axes.fill_between(range(len(stored)), stored, alpha=0.35, color="#2a9564", label="tokens stored", step="post")
axes.axhline(496, linestyle="--", linewidth=1, color="#d1504a")
axes.set_ylim(0, 800)
axes.text(0, 502, "all of the memory", va="bottom", fontsize=9)
axes.legend(loc="upper right")
picture([axes])

# %% [markdown]
# In blocks, the waste is only the empty part of the last block of each text. One piece each would not even fit: the blue line
# is above the limit, so the third client would have to wait, beside memory that is mostly empty. This is why servers page: more
# requests run at the same time, and each step serves them all.

# %%
assert max(pieces) > 496 > max(paged)
print(f"used of what is taken: {sum(stored) / sum(paged):.0%} in blocks, {sum(stored) / sum(pieces):.0%} in pieces")
for request_id in tables:
    print(f"\nrequest {request_id}: {engine.text(request_id)}")
assert all(state.state != "used" for state in engine.blocks.blocks()), "all blocks are free again"
engine.close()

# %% [markdown]
# ## What you have seen
#
# - The KV cache is one pool of blocks. A request has a **block table**: logical block → physical block.
# - A text takes a new block every 16 tokens. Nothing is reserved ahead, and nothing has to lie side by side.
# - The scheduler counts tokens, the block manager counts blocks, the model gets a plan with both.
#
# The code: `trio_llm/core/block_manager.py` and `block_pool.py`. Next: `03_prefix_caching`, where two tables share a block.
