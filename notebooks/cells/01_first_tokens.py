# %% [markdown]
# # First tokens
#
# `LLM` runs a model inside this process: no server, no network. Without a model's name it takes the demo model that
# ships with trio-llm, a toy of a million parameters that knows capitals, small sums and short stories.

# %%
from trio_llm import LLM, SamplingParams

llm = LLM(num_kv_blocks=256)
llm.info

# %% [markdown]
# ## Completing a text
#
# A language model continues a text. `temperature=0` takes the likeliest token each time, so the answer is always the
# same one.

# %%
greedy = SamplingParams(temperature=0, max_tokens=60)
[result] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
print(result.prompt + result.outputs[0].text)

# %% [markdown]
# ## Asking a question
#
# A chat is a text too, with marks that say who speaks. (The server does this for you, with the model's chat template.)


# %%
def chat(question: str) -> str:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    return f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


questions = [
    "What is the capital of Japan?",
    "What is 7 + 8?",
    "Repeat these words: map fox hill drum.",
    "Make JSON for an owl named Zoe, age 7.",
    "Who are you?",
]
for question, result in zip(
    questions, llm.generate([chat(question) for question in questions], greedy, use_tqdm=False)
):
    print(f"{question:45} {result.outputs[0].text}")

# %% [markdown]
# All five ran together: each step of the engine computes one token for each of them, in one forward pass.
#
# ## What came back
#
# A result holds the text, the token ids, why it ended, and how much of the prompt was found in the prefix cache. Ask
# again, and all full blocks of 16 tokens are found.

# %%
[result] = llm.generate(chat(questions[0]), greedy, use_tqdm=False)
output = result.outputs[0]
print("text         ", output.text)
print("token ids    ", output.token_ids)
print("ended because", output.finish_reason)
print("prompt tokens", len(result.prompt_token_ids), "of which cached", result.num_cached_tokens)

# %% [markdown]
# ## Temperature: choosing by chance
#
# With a temperature the next token is drawn. A `seed` makes the draw repeatable, whatever else is in the batch. Three
# samples of one prompt cost one reading of it:

# %%
story = SamplingParams(temperature=0.9, max_tokens=40, seed=7, n=3)
[result] = llm.generate(chat("Tell me a story about a fox."), story, use_tqdm=False)
for sample in result.outputs:
    print(f"{sample.index}: {sample.text}\n")

# %% [markdown]
# ## How sure is it?
#
# `logprobs` gives the likeliest candidates at each position. The model is sure of facts it was taught. About a word
# that it is free to choose it is not:

# %%
import math

from trio_llm.demo import demo_model_path
from trio_llm.tokenizer import Tokenizer

tokenizer = Tokenizer.from_directory(demo_model_path())
for prompt in (chat(questions[0]), chat("Tell me a story about a fox.")):
    [result] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=10, logprobs=3), use_tqdm=False)
    sample = result.outputs[0]
    print(sample.text)
    for entry in sample.logprobs:
        likeliest = [
            (tokenizer.decode([token_id], skip_special_tokens=False), logprob) for token_id, logprob in entry.top
        ]
        print("   ", "  ".join(f"{text!r:14} {math.exp(logprob):6.1%}" for text, logprob in likeliest))

# %% [markdown]
# ## Many at once
#
# The bar shows tokens per second, read and written. The engine takes prompts in as there is room.

# %%
countries = ["France", "Italy", "Spain", "Egypt", "Peru", "Chile", "Norway", "Sweden", "Poland", "Greece"]
results = llm.generate([chat(f"What is the capital of {country}?") for country in countries], greedy)
print(*[result.outputs[0].text for result in results], sep="\n")

# %% [markdown]
# `close` ends the engine and frees its memory; another one may follow in the same kernel. As a `with LLM() as llm:`
# block it happens by itself.

# %%
llm.close()
