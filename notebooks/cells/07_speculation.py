# %% [markdown]
# # Speculative decoding: guess, then check several tokens at once
#
# A decode reads all of the model's weights to write *one* token. To check five tokens takes about as long, because the weights are
# read once for all of them. So: let something cheap **guess** the next few tokens (*drafts*), and let the model **check** all of
# them in one step. What is right is kept. At the first wrong one, the model's own token takes its place.

# %%
from trio_llm.demo import draft_model_path
from trio_llm.notebook.charts import new_chart, picture
from trio_llm.notebook.stepper import Stepper, chat
from trio_llm.notebook.svg import PALETTE
from trio_llm.notebook.tokens import draw_tokens

plain = Stepper()
lookup = Stepper(spec_method="ngram", max_draft_tokens=4)
draft = Stepper(spec_method="draft_model", spec_model=str(draft_model_path()), max_draft_tokens=4)

# %% [markdown]
# ## Guess by looking back
#
# The simplest guesser needs no model. If the last few tokens occurred earlier in the text, what followed them there may follow again
# (*prompt look-up*, or *n-grams*). It is good where an answer repeats what was said: code that is edited, quotes, lists. Our client
# has got some JSON, and asks for it with another animal. We step until there is a guess, and stop before the model has run.

# %%
earlier = chat("Make JSON for an owl named Zoe, age 7.") + '{"name": "Zoe", "animal": "owl", "age": 7}<|im_end|>\n'
json_again = earlier + chat("Make JSON for a fox named Zoe, age 7.")
lookup.submit(json_again)
while True:
    lookup.ask()
    lookup.reserve()
    plan = lookup.plan()
    assert plan is not None
    if plan.drafts[0] == 4:
        break
    lookup.run()
    lookup.commit()

[sequence] = lookup.scheduler.running
known, drafts = list(sequence.tokens), list(plan.token_ids[1:])
marks = ["the text so far"] * 8 + ["drafts"] * 4
draw_tokens([*known[-8:], *drafts], lookup.decode, "Before the check: four drafts", marks=marks)

# %% [markdown]
# The last two tokens were in the text before, and the drafts are what came after them there. Now the model runs. The step computes
# five positions at once: the newest token, and the four drafts. After each of them it says what *it* would write next:

# %%
[sampled] = lookup.run().token_ids
right = len(sampled) - 1
marks = ["the text so far"] * 8 + ["right, kept"] * right + ["wrong, dropped"] * (4 - right) + ["the model's own"]
title = f"After the check: {len(sampled)} tokens in one step"
draw_tokens([*known[-8:], *drafts, sampled[-1]], lookup.decode, title, marks=marks)

# %% [markdown]
# The drafts are compared from left to right. Up to the first wrong one they are what the model would have written, so they are kept,
# and one token more comes for free: the model's own, after the last right one. **A step writes at least one token and at most five,
# and the text is the same as without drafts.** Only the number of steps changes. The whole answer:

# %%
lookup.commit()
lookup.finish()


def watch(engine: Stepper, prompt: str) -> tuple[int, list[str], list[tuple[int, int]]]:
    """Answer a prompt; return the steps, a mark for each token, and drafts with those accepted, by step."""
    request_id = engine.submit(prompt)
    steps, marks, drafted = 0, [], []
    while engine.ask() is not None:
        engine.reserve()
        if (plan := engine.plan()) is not None:
            before = len(engine.answers[request_id])
            engine.run()
            engine.commit()
            new = len(engine.answers[request_id]) - before
            marks += ["a draft"] * (new - 1) + ["the model's own"]
            drafted.append((plan.drafts[0] if plan.drafts else 0, new - 1))
            steps += 1
    return steps, marks, drafted


steps, marks, _ = watch(lookup, json_again)
tokens = lookup.answers[len(lookup.answers)]
draw_tokens(tokens, lookup.decode, f"{len(tokens)} tokens in {steps} steps, by looking back", marks=marks)

# %% [markdown]
# Each *own* token is the end of a step. At `fox` the look-up was wrong: it expected the owl.
#
# ## Guess with a small model
#
# A *draft model* is a smaller model with the same tokens. It writes four tokens while the large one checks. It needs no repetition:

# %%
story = chat("Tell me a story about a fox.")
steps, marks, _ = watch(draft, story)
tokens = draft.answers[len(draft.answers)]
draw_tokens(tokens, draft.decode, f"{len(tokens)} tokens in {steps} steps, with a draft model", marks=marks)

# %% [markdown]
# Phrases are easy for the small model, too. It stumbles where there is a choice: a name, a place, a colour.
#
# ## What it saves, and when

# %%
told = story + draft.text(len(draft.answers)) + "<|im_end|>\n"
prompts = {
    "a story": story,
    "the story again": told + story,
    "JSON, changed": json_again,
    "repeat words": chat("Repeat these words: map fox hill drum river owl."),
}
engines = {"without drafts": plain, "looking back": lookup, "a draft model": draft}
runs = {name: [watch(engine, prompt) for prompt in prompts.values()] for name, engine in engines.items()}

left, right = new_chart("Steps for the answer", "Drafts accepted, by their place", size=(8.8, 3.2))
for at, (name, answers) in enumerate(runs.items()):
    places = [x + 0.27 * (at - 1) for x in range(len(prompts))]
    bars = left.bar(places, [steps for steps, *_ in answers], 0.25, label=name)
    left.bar_label(bars, fontsize=8)
    drafted = [pair for *_, pairs in answers for pair in pairs if pair[0] == 4]
    if drafted:
        rates = [sum(accepted > place for _, accepted in drafted) / len(drafted) for place in range(4)]
        right.plot([1, 2, 3, 4], rates, marker="o", color=PALETTE[at], label=name)
left.set_xticks(range(len(prompts)), list(prompts), fontsize=8)
left.legend(fontsize=8)
right.set(ylim=(0, 1), xticks=[1, 2, 3, 4], xlabel="place of the draft")
right.legend(fontsize=8)
picture([left, right])

# %%
for number, what in enumerate(prompts):
    texts = {name: engine.answers[len(engine.answers) - 3 + number] for name, engine in engines.items()}
    assert texts["without drafts"] == texts["looking back"] == texts["a draft model"]
    print(f"{what:16} {plain.decode(texts['looking back'])[:80]}")
saved = {name: sum(steps for steps, *_ in answers) for name, answers in runs.items()}
print(saved)
assert max(saved["a draft model"], saved["looking back"]) < saved["without drafts"]

# %% [markdown]
# On the right: a draft counts only if all before it were right, so later ones are accepted less often. That is why there are four, not
# forty: each draft costs a little, and the last ones are mostly thrown away.
#
# It saves **steps**. It saves time as long as a step with drafts takes about as long as one without: with few requests at a time.
# With many, the batch is full of work already, and the drafts come on top.
#
# ## What you have seen
#
# - A guesser proposes, the model checks all in one step; right drafts are kept, and the text never changes.
# - Looking back costs nothing and finds repetition. A draft model costs its own steps and finds more.
# - Switch it on with `--spec-method ngram` or `draft_model`. `vllm:spec_decode_num_accepted_tokens_total` in `/metrics` says what it is
#   worth for your traffic.
#
# The code: `trio_llm/core/speculation.py` and `prompt_lookup.py`; [Speculative decoding](../docs/speculation.md).

# %%
for engine in engines.values():
    engine.close()
