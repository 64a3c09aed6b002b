# %% [markdown]
# # First tokens
#
# `LLM` runs a model inside this process: no server, no network. This is the demo model, which ships with trio-llm. It has 1.5
# million parameters and knows capitals, small sums and short stories.

# %%
import math

from trio_llm import LLM, SamplingParams
from trio_llm.demo import demo_model_path
from trio_llm.notebook.charts import new_chart, picture
from trio_llm.notebook.tokens import draw_tokens
from trio_llm.tokenizer import Tokenizer

llm = LLM(str(demo_model_path()), num_kv_blocks=256)
tokenizer = Tokenizer.from_directory(demo_model_path())


def text_of(token_ids) -> str:
    """Return the text of tokens, with the marks that are not shown to a reader."""
    return tokenizer.decode(token_ids, skip_special_tokens=False)


print(f"{llm.info.name}: {llm.info.vocab_size:,} different tokens, texts of up to {llm.info.max_model_len:,} of them")

# %% [markdown]
# ## A text is a list of tokens
#
# A language model continues a text. It reads and writes **tokens**: pieces of text, each with a number. `temperature=0` takes the
# most likely next one each time, so the answer is always the same.

# %%
prompt = "The capital of France is"
[result] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
read, written = result.prompt_token_ids, result.outputs[0].token_ids
print(prompt + result.outputs[0].text)
marks = ["read"] * len(read) + ["written"] * len(written)
draw_tokens([*read, *written], text_of, "Each box: the text of a token, and its number", marks=marks)

# %% [markdown]
# ## A question is a text too
#
# In a chat, marks say who is speaking. `llm.chat` and the server write them for you, with the model's chat template. Here we write
# them ourselves, to see them.


# %%
def chat(question: str) -> str:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    return f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


greedy = SamplingParams(temperature=0, max_tokens=60)
[result] = llm.generate(chat("What is the capital of Japan?"), greedy, use_tqdm=False)
output = result.outputs[0]
marks = ["read"] * len(result.prompt_token_ids) + ["written"] * len(output.token_ids)
draw_tokens([*result.prompt_token_ids, *output.token_ids], text_of, "A question and its answer", marks=marks)

# %% [markdown]
# The model wrote the mark `<|im_end|>` itself: this is how it says that it is done.

# %%
print("text         ", output.text)
print("ended because", output.finish_reason)
assert output.text == "The capital of Japan is Tokyo." and text_of(output.token_ids[-1:]) == "<|im_end|>"

# %% [markdown]
# ## Many questions at once
#
# All five run together: each step of the engine computes one token for each of them, in one pass through the model.

# %%
questions = [
    "What is the capital of Peru?",
    "What is 7 + 8?",
    "Repeat these words: map fox hill drum.",
    "Make JSON for an owl named Zoe, age 7.",
    "Who are you?",
]
for question, one in zip(questions, llm.generate([chat(question) for question in questions], greedy, use_tqdm=False)):
    cached = f"{one.num_cached_tokens} of {len(one.prompt_token_ids)}"
    print(f"{question:39} {one.outputs[0].text:52} {cached}")

# %% [markdown]
# The last column is how many tokens of the prompt were *cached*: a prompt that begins with the same 16 tokens as an earlier one
# (here up to `What is`) finds them computed already. `03_prefix_caching` shows how.
#
# ## Random choice
#
# With a temperature above 0, the next token is drawn at random, the likely ones more often. A `seed` makes the draw repeatable,
# whatever else is in the batch. Three samples of one prompt read it only once:

# %%
story = SamplingParams(temperature=0.9, max_tokens=40, seed=7, n=3)
[result] = llm.generate(chat("Tell me a story about a fox."), story, use_tqdm=False)
for sample in result.outputs:
    print(f"{sample.index}: {sample.text}\n")
[again] = llm.generate(chat("Tell me a story about a fox."), story, use_tqdm=False)
assert [one.text for one in again.outputs] == [one.text for one in result.outputs]

# %% [markdown]
# ## How sure is it?
#
# `logprobs` returns the most likely tokens at each position. A chart of the first ten tokens of two answers: one bar for each, as
# high as the probability of the token that was written, and above it the runner-up.


# %%
def sureness(prompt: str) -> tuple[list[str], list[float], list[float]]:
    """Return the tokens of an answer, their probabilities, and those of the second choice."""
    [result] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=10, logprobs=2), use_tqdm=False)
    entries = result.outputs[0].logprobs or ()
    labels = [f"{text_of([one.token_id])!r} {one.token_id}" for one in entries]
    return labels, [math.exp(one.logprob) for one in entries], [math.exp(one.top[1][1]) for one in entries]


fact, fiction = sureness(chat("What is the capital of Japan?")), sureness(chat("Tell me a story about a fox."))
axes = new_chart("A fact: no doubt", "A story: free to choose", y="probability", size=(8.6, 3.4))
for one, (labels, chosen, second) in zip(axes, (fact, fiction), strict=True):
    one.bar(range(len(labels)), chosen, label="the token that was written")
    one.bar(range(len(labels)), second, bottom=chosen, label="the second choice", alpha=0.5)
    one.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
    one.set_ylim(0, 1.3)
    one.legend(loc="upper right", fontsize=8, ncols=2)
picture(axes)

# %%
print(f"the fact:  at least {min(fact[1]):.0%} sure of each token")
print(f"the story: at least {min(fiction[1]):.0%} sure of each token")
assert min(fact[1]) > 0.9 > 0.5 > min(fiction[1])

# %% [markdown]
# The model was trained on facts that never vary and on stories that do. Where the name of the fox is chosen, it is not sure at
# all, and a temperature above 0 makes it another fox each time.
#
# ## What next
#
# `close` ends the engine and frees its memory; a `with LLM() as llm:` block does it for you. The next notebook, `02_paged_kv`,
# looks inside a step.

# %%
llm.close()
