# %% [markdown]
# # Prefix caching: what was computed once
#
# Prompts begin alike: the same system prompt, the same document, the same conversation up to the last question. The keys and
# values of a token depend only on the tokens *before and at* its place. So two prompts that begin with the same tokens have
# the same keys and values there, and a server can compute them once.

# %%
# %load_ext trio_llm.notebook
from trio_llm.notebook import show_texts
from trio_llm.notebook.charts import new_chart, picture
from trio_llm.notebook.pictures import draw_pool
from trio_llm.notebook.stepper import Stepper, chat
from trio_llm.notebook.tokens import draw_tokens

engine = Stepper(num_kv_blocks=32, max_num_batched_tokens=128)
show_texts(engine.tokenizer.decode)
RULES = (
    "You are a helpful assistant at a small library. Answer in one sentence. Be kind. "
    "If you do not know something, say so. Do not tell a story when a fact was asked for."
)

# %% [markdown]
# ## What an answer leaves behind
#
# A first client asks a question, under the rules of a library. Then its request is over and its blocks are free.

# %%
first = engine.submit(chat("What is the capital of Japan?", RULES))
engine.finish()
print(engine.text(first))
engine.blocks

# %% [markdown]
# Free, but not empty. A dashed block still holds the keys and values of its 16 tokens, and a dot marks it: it is filed in the
# **prefix cache**. It stays there until its memory is needed. (The last block of the text was not full, so it is not filed.)
#
# ## Two clients with the same rules
#
# Two more questions arrive together. Watch what the block manager grants:

# %%
peru = engine.submit(chat("What is the capital of Peru?", RULES))
kenya = engine.submit(chat("What is the capital of Kenya?", RULES))
engine.ask()
grant = engine.reserve()
grant

# %% [markdown]
# Both rows start at position 64, not at 0: four full blocks of their prompts were *found*. Only the rest is computed.

# %%
prompt = engine.scheduler.waiting[0].tokens
cached = grant.starts[0]
marks = ["found in the cache"] * cached + ["computed"] * (len(prompt) - cached)
draw_tokens(prompt, engine.decode, f"The prompt of request {peru}", marks=marks, row_tokens=16)

# %%
engine.plan()
engine.run()
engine.commit()
draw_pool(engine.blocks, "Two requests share the beginning of their prompts")

# %% [markdown]
# The big number counts the owners of a block. The shared ones have two, and stay until both have left. Sharing needs no copy,
# because a full block never changes: new tokens go to blocks of their own.

# %%
shared = [state for state in engine.blocks.blocks() if len(state.owners) == 2]
assert len(shared) == cached // 16 == 4
engine.finish()
print(engine.text(peru), engine.text(kenya), sep="\n")

# %% [markdown]
# ## What counts as the same
#
# A block is filed under a hash of **all tokens up to its end**, not of its own 16 tokens alone: the same words after another
# beginning have other keys and values. So one different word ends the match, and what follows it is computed again, even if
# it is the same text.


# %%
def found(prompt: str) -> int:
    """Submit a prompt, and return how many of its tokens were in the cache."""
    request_id = engine.submit(prompt, max_tokens=1)
    engine.finish()
    return engine.ended[request_id].usage.cached_tokens


question = "What is the capital of Peru?"
hits = {
    "the same prompt": found(chat(question, RULES)),
    "another question": found(chat("Who are you?", RULES)),
    "another word in the middle": found(chat(question, RULES.replace("kind", "brave"))),
    "another first word": found(chat(question, RULES.replace("You are", "I am"))),
}
for what, tokens in hits.items():
    print(f"{what:28} {tokens:3} tokens found, {tokens // 16} blocks")
assert list(hits.values()) == sorted(hits.values(), reverse=True) and hits["another first word"] == 0

# %% [markdown]
# Two rules for fast prompts follow: put what never changes first, and what changes (a date, a name, the question) last.
#
# ## What it is worth: the time to the first token
#
# A client waits for its first token while its prompt is computed. We send prompts of 128 to 1,152 tokens twice. Before the first
# time the cache knows nothing of them; the second time it knows all but the last block.

# %%
engine.close()
engine = Stepper(num_kv_blocks=256, max_num_batched_tokens=256)


def first_token(prompt: str) -> tuple[float, int]:
    """Return the seconds in the model until the first token, and the number of steps."""
    before = len(engine.seconds)
    engine.submit(prompt, max_tokens=1)
    engine.finish()
    return 1000 * sum(engine.seconds[before:]), len(engine.seconds) - before


first_token(chat("Who are you?"))  # The first steps of a process are slow.
lengths, cold, warm = [128, 384, 640, 896, 1152], [], []
for length in lengths:
    tries = []
    for number in range(3):  # The best of three: other programs use this machine, too.
        text = f"Story {number} of {length}:" + " The fox ran to the river." * 400
        prompt = engine.tokenizer.decode(engine.encode(text)[:length])
        (ms, steps), (again_ms, again_steps) = first_token(prompt), first_token(prompt)
        assert steps == -(-len(engine.encode(prompt)) // 256), "256 tokens a step"
        assert again_steps == 1, "one step computes the last block"
        tries.append((ms, again_ms))
    cold.append(min(ms for ms, _ in tries))
    warm.append(min(again_ms for _, again_ms in tries))

[axes] = new_chart("Time to the first token", x="tokens of the prompt", y="milliseconds in the model")
axes.plot(lengths, cold, marker="o", label="nothing in the cache")
axes.plot(lengths, warm, marker="o", label="the beginning in the cache")
axes.set(ylim=(0, None), xlim=(0, None), xticks=lengths)
axes.legend(loc="upper left")
picture([axes])

# %% [markdown]
# Without the cache the wait grows with the prompt: each step has room for 256 tokens. With it, one step computes the last few
# tokens, however long the prompt is.
#
# ## What you have seen
#
# - Full blocks are filed under a hash of everything up to their end. A new prompt takes them and starts after them.
# - A block that several requests own has a reference count. Nobody writes into it.
# - Free blocks stay in the cache until they are needed. `05_preemption` shows which ones are given up first.
#
# A server says how much it found: `cached_tokens` in every answer's `usage`, `vllm:prefix_cache_hits_total` in `/metrics`.
# Requests of different API keys never share. The code: `trio_llm/core/prefix.py`.

# %%
engine.close()
