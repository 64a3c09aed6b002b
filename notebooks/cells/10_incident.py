# %% [markdown]
# # An incident: open a record, find why, try another configuration
#
# *"At noon one story stopped in the middle, and went on much later."* The load is gone and nobody can repeat it. But the server was started
# with `--record`, and a record is a time machine: it holds what came to the scheduler from outside, so the real scheduler and block
# manager can be rebuilt **at any step**, on another machine and without the model.

# %%
# %load_ext trio_llm.notebook
import tempfile
from pathlib import Path

from IPython.display import display

from trio_llm import LLM, SamplingParams
from trio_llm.demo import demo_model_path
from trio_llm.notebook.charts import new_chart, picture
from trio_llm.notebook.pictures import draw_diff
from trio_llm.notebook.scrubber import scrub
from trio_llm.notebook.stepper import chat
from trio_llm.notebook.timeline import draw_timeline, moments_of
from trio_llm.replay import Replay, capsule
from trio_llm.replay.lives import follow

folder = Path(tempfile.mkdtemp())
MODEL = {
    "model": str(demo_model_path()),
    "dtype": "float32",
    "max_num_batched_tokens": 64,
    "target_step_s": 0.0,
    "max_model_len": 368,
}

# %% [markdown]
# ## Noon
#
# Seven clients come at the same time, to a server with a small pool. (`record_tokens` keeps tokens, too, so that the answers can be
# compared at the end. Without it a record has lengths and times only.)

# %%
animals = ["a fox", "an owl", "a bear", "a cat"]
prompts = [chat(f"Tell me a story about {animal}.") for animal in animals]
prompts += [chat(question) for question in ("What is the capital of Peru?", "Count from 1 to 12.", "Who are you?")]
params = [SamplingParams(temperature=0.7, seed=seed, max_tokens=200) for seed in range(len(prompts))]
with LLM(num_kv_blocks=24, record=str(folder), record_tokens=True, **MODEL) as llm:
    llm.generate(prompts, params, use_tqdm=False)

replay = Replay.open(folder)
replay

# %% [markdown]
# ## Who was slow, and in which part of its life?
#
# `replay.explain` tells of a request what `GET /v1/requests/{id}/explain` tells while the server remembers it.

# %%
told = {life.request_id: replay.explain(life.request_id) for life in follow(replay)[0]}
[axes] = new_chart("Where the time of each request went", x="milliseconds", size=(7.6, 3.0))
start = [0.0] * len(told)
for part in ("queue", "prefill", "decode"):
    spent = [1000 * (getattr(one, f"{part}_s") or 0.0) for one in told.values()]
    axes.barh([f"request {number}" for number in told], spent, left=start, label=part)
    start = [before + now for before, now in zip(start, spent, strict=True)]
for row, one in enumerate(told.values()):
    if one.preempted_steps:
        axes.annotate("preempted", (start[row], row), (6, 0), textcoords="offset points", va="center", fontsize=9)
axes.invert_yaxis()
axes.margins(x=0.2)
axes.legend(fontsize=8, loc="upper right")
picture([axes])

# %% [markdown]
# One had been *preempted*. What does its explanation say?

# %%
victim, one = max(told.items(), key=lambda item: (len(item[1].preempted_steps), item[1].total_s))
assert one.preempted_steps, "the pool was too small"
print(f"request {victim}: {one.num_prompt_tokens} prompt tokens, preempted in step {one.preempted_steps}")
for wait in one.waits:
    held = ", ".join(f"request {holder} held {blocks}" for holder, blocks in wait.holders.items())
    print(
        f"steps {wait.first_step} to {wait.last_step}: waited for {wait.reason}; {wait.free_blocks} blocks free; {held}"
    )
for chunk in one.chunks:
    print(
        f"step {chunk.step}: computed {chunk.count} tokens from position {chunk.first}{' AGAIN' if chunk.again else ''}"
    )

# %% [markdown]
# ## Stand still in that step
#
# The replay goes to the step, and one back. What changed between the two?

# %%
step = one.preempted_steps[0]
before = replay.at(step - 1).blocks.blocks()
after = replay.forward().blocks.blocks()
display(replay.grant, draw_diff(before, after, f"Step {step}: request {victim} loses its blocks"))
assert replay.grant is not None and victim in replay.grant.preempted

# %% [markdown]
# The same as a timeline: the steps around the preemption (×), and those around the return. In the full-coloured cell the request computes
# again what it had lost. Then move the slider to walk through all steps (a notebook that is only read shows one).

# %%
again = next(chunk.step for chunk in one.chunks if chunk.again)
moments = moments_of(replay.traces(), told)
near = [moment for moment in moments if min(abs(moment.step - step), abs(moment.step - again)) <= 6]
draw_timeline(near, f"Request {victim} loses its blocks in step {step}, and is back in step {again}")

# %%
scrub(replay.at(step))

# %% [markdown]
# ## What if there had been twice the blocks?
#
# The *same arrivals*, through the same scheduler, with another configuration. A step takes the time that a model says, fitted from the
# recorded steps; both columns run on it.

# %%
better = replay.what_if(num_kv_blocks=48)
better

# %%
[axes] = new_chart("Steps from arrival to the end", y="steps", size=(7.6, 2.8))
runs = {"24 blocks, as recorded": better.before, "48 blocks": better.after}
for at, (name, run) in enumerate(runs.items()):
    places = [number + 0.4 * at for number in range(len(run.latencies))]
    axes.bar(places, [latency.total_steps or 0 for latency in run.latencies], 0.38, label=name)
axes.set_xticks([number + 0.2 for number in range(len(told))], [f"request {number}" for number in told], fontsize=8)
axes.legend(fontsize=8)
picture([axes])

# %%
preemptions = {name: sum(latency.num_preemptions for latency in run.latencies) for name, run in runs.items()}
print("preemptions:", preemptions)
assert preemptions["24 blocks, as recorded"] > 0 == preemptions["48 blocks"]
assert better.after.num_steps < better.before.num_steps

# %% [markdown]
# ## Is it really only slower, never different?
#
# With tokens in the record and the model at hand, the answers can be generated again, with the new configuration, and compared:

# %%
with LLM(num_kv_blocks=48, **MODEL) as llm:
    different = replay.compare(llm.generate)
print("answers that differ:", different)
assert not different

# %% [markdown]
# ## Keep it as a test
#
# `cut` writes this one request, and all that shared its steps, to a file. A test replays it without a server and without the model, and
# fails if a change of the scheduler changes what happens in it.

# %%
path = replay.cut(victim, folder / "noon.record")
lives = capsule.run(path)
print(f"{path.stat().st_size:,} bytes, {len(lives)} requests")
assert lives[victim].preempted == one.preempted_steps

# %% [markdown]
# ## What you have seen
#
# From a slow answer to its cause: `explain` → the step → who held the blocks → the same noon with another configuration. In the terminal,
# `trio-llm trace` prints and exports records; [Records](../docs/records.md) has the rest.
