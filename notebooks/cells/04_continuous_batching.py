# %% [markdown]
# # Continuous batching and chunked prefill: why nobody waits for somebody else's end
#
# A step of the model costs nearly the same for one request as for eight, because most of its time goes into reading the weights.
# So a server computes many requests in one step. Two ideas make that work for requests that come and go at any time.

# %%
# %load_ext trio_llm.notebook
from trio_llm.notebook.charts import new_chart, picture
from trio_llm.notebook.stepper import Stepper, chat
from trio_llm.notebook.timeline import draw_budget, draw_timeline

engine = Stepper(max_batch_size=4, max_num_batched_tokens=64, enable_prefix_caching=False)

# %% [markdown]
# ## First idea: a free place is filled at once
#
# Eight questions, at most four at a time. Some answers are short, some are long. The old way is a *static* batch: take four,
# run until all four are done, then take the next four.

# %%
questions = [
    "What is the capital of Japan?", "Count from 1 to 12.", "What is 7 + 8?", "Make JSON for an owl named Zoe, age 7.",
    "Who are you?", "What is the capital of Peru?", "Repeat these words: map fox hill drum.", "Count from 3 to 9.",
]  # fmt: skip
for group in (questions[:4], questions[4:]):
    for question in group:
        engine.submit(chat(question))
    engine.finish()
static = sum(any(cell.count for cell in moment.cells.values()) for moment in engine.history.moments)
draw_timeline(engine.history.moments, f"Static batches: {static} steps")

# %% [markdown]
# Each row is a request, each column a step. In a full-coloured cell the prompt is read, in a pale one a token is written;
# hover to see which. The holes at the right of each batch are wasted: three are done, and the queue waits for the one that counts
# to twelve.
#
# The **continuous** way: all eight are queued, and whoever ends makes room for the next, in the very next step.

# %%
again = [engine.submit(chat(question)) for question in questions]
engine.finish()
moments = [moment for moment in engine.history.moments if moment.cells.keys() & set(again)]
continuous = sum(any(cell.count for cell in moment.cells.values()) for moment in moments)
draw_timeline(moments, f"Continuous batching: {continuous} steps")

# %%
for request_id in again:
    print(f"request {request_id:2}: {engine.text(request_id)}")
    assert engine.answers[request_id] == engine.answers[request_id - 8], "the same answers, token for token"
assert continuous < static

# %% [markdown]
# Dashes are steps in which a request waits for a place. The new ones read their prompts *in the same step* in which the others
# write: rows of one token and rows of many lie side by side in one **ragged batch**.
#
# ## Second idea: a long prompt comes in chunks
#
# That mixture has a danger. A prompt of a thousand tokens makes a long step, and everybody who is writing waits for it. So a step
# has a **token budget** (`max_num_batched_tokens`). Decodes are scheduled first, one token each. A prompt gets what is left, and
# goes on in the next step.
#
# A client listens to a story. After six tokens, another client sends a prompt of 600 tokens. We try it with a budget of 1,024,
# where all of it fits in one step, and with 64.


# %%
def story_with_a_guest(budget_tokens: int) -> tuple[Stepper, int, int]:
    engine = Stepper(max_num_batched_tokens=budget_tokens)
    story = engine.submit(chat("Tell me a story about a fox."), temperature=0.7, seed=3, max_tokens=32)
    engine.steps(7)
    document = engine.decode(engine.encode("The fox ran to the river and the owl sang. " * 80)[:580])
    guest = engine.submit(chat(document + " Who are you?"), max_tokens=8)
    engine.finish()
    return engine, story, guest


whole, story, guest = story_with_a_guest(1024)
chunked, *_ = story_with_a_guest(64)
draw_timeline(chunked.history.moments, "A long prompt comes while a story is told (budget 64)")

# %%
draw_budget(chunked.history.moments, 64)

# %% [markdown]
# Look at the steps in the middle. The thin pale stripe at the bottom is the story's one token; it is in *every* step. The other 63
# places of the budget go to a chunk of the long prompt. The story never pauses, and the prompt is done after ten steps.
#
# What does its listener feel? The time between two tokens:


# %%
def gaps_ms(engine: Stepper, request_id: int) -> list[float]:
    """Return the milliseconds of each step that wrote a token of this request."""
    timed = zip(engine.history.moments, engine.seconds, strict=False)
    return [
        1000 * seconds for moment, seconds in timed if moment.cells.get(request_id) and moment.cells[request_id].token
    ]


one, many = gaps_ms(whole, story)[1:], gaps_ms(chunked, story)[1:]
left, right = new_chart(
    "The prompt in one step", "The prompt in chunks", x="token of the story", y="milliseconds since the last one"
)
left.bar(range(2, 2 + len(one)), one)
right.bar(range(2, 2 + len(many)), many, color="#2a9564")
right.sharey(left)
picture([left, right])

# %% [markdown]
# The same work, told in two ways. In one step, the story stops for as long as the whole prompt takes. In chunks, ten tokens come
# a little later each. On a GPU the numbers are smaller, and the shape is the same.


# %%
def shared_steps(engine: Stepper) -> list[int]:
    """Return the tokens of each step that both requests share."""
    moments = [moment.cells for moment in engine.history.moments if {story, guest} <= moment.cells.keys()]
    return [sum(cell.count for cell in cells.values()) for cells in moments if cells[guest].kind == "prefill"]


print("tokens of the steps that read the long prompt:")
print("  budget 1024:", shared_steps(whole))
print("  budget   64:", shared_steps(chunked))
assert len(shared_steps(whole)) == 1 and max(shared_steps(chunked)) <= 64
assert whole.answers == chunked.answers, "the answers do not depend on the chunks"
assert len(one) == len(many) == 31, "the story gets a token in every step, either way"

# %% [markdown]
# ## What you have seen
#
# - **Continuous batching**: requests join and leave the batch between any two steps.
# - **Chunked prefill**: a step's budget bounds its time. Decodes come first, prompts get the rest.
# - The price: the long prompt's own first token comes a little later, because each chunk reads the weights again. A smaller budget
#   is smoother for those who write, a larger one is faster for those who begin. On a CPU the server measures and chooses by itself
#   (`--target-step-secs`).
#
# The code: `Scheduler.ask` in `trio_llm/core/scheduler.py`, which is a few lines. Next: `05_preemption`, when memory runs out.

# %%
for engine in (engine, whole, chunked):
    engine.close()
