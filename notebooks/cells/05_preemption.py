# %% [markdown]
# # Preemption and eviction: when memory runs out
#
# A server admits a request when its prompt fits into the KV cache. How long the answer becomes, nobody knows. So it can happen that
# running requests need a block and none is free. Here we make it happen, in a pool that holds two stories and gets three.

# %%
# %load_ext trio_llm.notebook
from trio_llm.notebook import show_texts
from trio_llm.notebook.charts import new_chart, picture
from trio_llm.notebook.pictures import draw_diff
from trio_llm.notebook.stepper import Stepper, chat
from trio_llm.notebook.svg import colour
from trio_llm.notebook.timeline import draw_timeline

engine = Stepper(num_kv_blocks=16, max_num_batched_tokens=64)
show_texts(engine.tokenizer.decode)
engine.blocks

# %% [markdown]
# ## Three stories in a pool for two
#
# Each story will have about 112 tokens with its prompt: seven blocks. Fifteen blocks hold two of them. All three clients come
# at the same time, and at first there is room for all.

# %%
asked = [("a fox", 2), ("an owl", 3), ("a bear", 4)]
stories = [
    engine.submit(chat(f"Tell me a story about {animal}."), temperature=0.7, seed=seed) for animal, seed in asked
]
preempted = []
while not preempted:
    engine.step()
    preempted = [id for id, cell in engine.history.moments[-1].cells.items() if cell.kind == "preempted"]
lost_at = len(engine.history.moments) - 1
engine.history.diff()

# %% [markdown]
# One request needed a new block, and there was none. So the request that came **last** was *preempted*: it lost all of its blocks
# at once. First come, first served: whoever came first always goes on, so there is always somebody who gets to the end and makes
# room.
#
# Its client notices a pause, nothing else. Its tokens are not lost: they are a few bytes, and stay with the scheduler. Only their
# keys and values must be computed again.

# %%
[victim] = preempted
assert victim == stories[-1], "the last one that came"
print("so far:", engine.text(victim))
engine.scheduler

# %%
engine.finish()
moments = engine.history.moments
back_at = next(at for at in range(lost_at + 1, len(moments)) if moments[at].cells[victim].count)
around = moments[lost_at - 4 : lost_at + 5] + moments[back_at - 4 : back_at + 5]
draw_timeline(around, "The step without room (✕), and the return")

# %% [markdown]
# The cross is the preemption. Dashes: it waits, at the front of the queue. When one of the others has ended and its whole text fits,
# it comes back (the picture leaves out the steps between). The full-coloured cell reads again what is no longer in the cache: of
# its prompt *and of what it had written*. Then it writes on, with the next word.
#
# The whole story in one picture: who holds the blocks, step by step.

# %%
held = {
    story: [sum(any(owner == story for owner, *_ in block.owners) for block in moment.blocks) for moment in moments]
    for story in stories
}
cached = [sum(block.state == "cached" for block in moment.blocks) for moment in moments]

[axes] = new_chart("Blocks by request", x="step", y="blocks", size=(7.6, 3.2))
axes.stackplot(
    range(len(moments)), *held.values(), cached,
    labels=[*(f"request {story}" for story in stories), "free, still cached"],
    colors=[*map(colour, stories), "#8b949e55"], step="post",
)  # fmt: skip
axes.axhline(15, linestyle="--", linewidth=1.2, color="#d1504a")
axes.annotate("no block is free:\nthe last one loses its own", (lost_at, 15), (lost_at - 4, 18), fontsize=9, ha="right",
              va="center", arrowprops={"arrowstyle": "->", "color": "#d1504a"})  # fmt: skip
axes.annotate("it comes back", (back_at, 14), (back_at + 6, 17.2), fontsize=9, va="center",
              arrowprops={"arrowstyle": "->", "color": "#d1504a"})  # fmt: skip
axes.set(ylim=(0, 22), xlim=(0, len(moments)), yticks=[0, 3, 6, 9, 12, 15])
axes.legend(loc="upper right", ncols=4, fontsize=8, borderaxespad=0)
picture([axes])

# %% [markdown]
# Most of what the victim lost was still in the prefix cache (grey) when it came back, so little had to be computed again:

# %%
for story in stories:
    computed = sum(moment.cells[story].count for moment in moments if story in moment.cells)
    needed = engine.ended[story].usage.prompt_tokens + len(engine.answers[story]) - 1
    print(f"request {story}: {computed} tokens computed, {needed} needed; {engine.text(story)[:48]} …")
    assert (computed > needed) == (story == victim)

# %% [markdown]
# ## It changes no token
#
# The proof: alone in the pool, the same request gives the same tokens. This is tested for every family of models, because it is
# easy to get wrong: one key from a wrong block, and the story is another one.

# %%
animal, seed = asked[stories.index(victim)]
alone = engine.submit(chat(f"Tell me a story about {animal}."), temperature=0.7, seed=seed)
engine.finish()
assert engine.answers[alone] == engine.answers[victim]
assert not any(cell.kind == "preempted" for moment in moments[lost_at + 1 :] for cell in moment.cells.values())

# %% [markdown]
# ## Eviction: what the cache forgets
#
# Preemption takes blocks from the living. Before it comes to that, the pool takes free blocks that are still cached: it *evicts* them,
# the least recently used first. A new client comes with a long prompt:

# %%
text = chat(f"Tell me a story about {animal}.") + engine.text(alone)
before = engine.blocks.blocks()
engine.submit("The owl and the fox ran to the river. " * 17, max_tokens=1)
engine.steps(3)
draw_diff(before, engine.blocks.blocks(), "What a long prompt took from the cache")

# %% [markdown]
# It took empty blocks first, and then cached ones. Of a text, the last blocks go before the first ones, because a block is of use
# only with all that comes before it. So the story that we just read is still found, but not to its end:

# %%
engine.finish()
tokens = len(engine.encode(text))
repeat = engine.submit(text, max_tokens=1)
engine.finish()
found = engine.ended[repeat].usage.cached_tokens
print(f"{tokens} tokens, of which {found} are still in the cache")
assert 0 < found < tokens // 16 * 16

# %% [markdown]
# ## What you have seen
#
# - **Preemption**: no free block, so the last request in policy order gives up its own and is computed again later.
# - **Eviction**: a free block that is still cached gets a new owner. It costs nobody anything, but the next hit is shorter.
# - Neither changes an answer. Both cost time: `vllm:num_preemptions_total` in `/metrics` should be near zero. If it is not, give the
#   pool more blocks (`--kv-blocks`), or admit fewer requests (`--max-batch-size`).
#
# The code: `_make_room` in `trio_llm/core/block_manager.py`.

# %%
engine.close()
