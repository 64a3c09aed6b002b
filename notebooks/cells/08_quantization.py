# %% [markdown]
# # Quantization: fewer bytes, and what they cost
#
# A decode reads every weight of the model once. So half the bytes are half the time, where memory is the limit, and a model of twice
# the size fits. **Quantization** stores a weight as a small whole number times a *scale* that many weights share. How small may the
# numbers be? Here you round the demo model's own weights to 8 and to 4 bits, and measure what comes out.

# %%
import os
import shutil
import tempfile
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trio_llm import LLM, SamplingParams
from trio_llm.demo import demo_model_path
from trio_llm.model.ops.matrices import Blocks
from trio_llm.model.ops.torch_reference import dequantize, quantize_rows
from trio_llm.notebook.charts import new_chart, picture
from trio_llm.notebook.stepper import chat

weights = load_file(demo_model_path() / "model.safetensors")
matrices = {name: weight.float() for name, weight in weights.items() if weight.ndim == 2 and "layers" in name}
print(len(matrices), "matrices of the layers,", sum(weight.numel() for weight in matrices.values()), "weights")

# %% [markdown]
# ## Eight bits
#
# The largest weight of a row becomes 127, all others keep their proportion and are rounded. One scale for each row is stored beside
# them. `quantize_rows` is what the server calls for `--quantization int8`.


# %%
def eight_bits(weight: Tensor) -> Tensor:
    """Round to 8 bits with a scale for each row, and return what the model would see."""
    numbers, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    quantize_rows(weight, numbers, scale)
    return numbers.float() * scale[:, None]


row = matrices["model.layers.0.mlp.down_proj.weight"][:1]
numbers, scale = torch.empty(row.shape, dtype=torch.int8), torch.empty(1)
quantize_rows(row, numbers, scale)
print("weights   ", *(f"{one:8.4f}" for one in row[0, :8].tolist()))
print("numbers   ", *(f"{one:8}" for one in numbers[0, :8].tolist()), f"  times the scale {scale.item():.6f}")
print("come back ", *(f"{one:8.4f}" for one in eight_bits(row)[0, :8].tolist()))
assert (eight_bits(row) - row).abs().max() <= scale.item() / 2 * 1.001, "at most half a step away"

# %% [markdown]
# ## Four bits
#
# Four bits have 16 numbers, so a step is 16 times as wide. One large weight makes the step of its whole row wide. So the row is cut into
# **groups** of 32, each with its own scale: more scales to store, smaller steps. Two numbers share a byte. `Blocks` is the server's own
# type for such weights, and `dequantize` defines what they mean (the kernels are tested against it).


# %%
def four_bits(weight: Tensor, group: int) -> Blocks:
    """Round to 4 bits, with a scale for each group of a row."""
    grouped = weight.unflatten(-1, (-1, group))
    scale = (grouped.abs().amax(-1) / 7).clamp_min(1e-8).half()
    numbers = ((grouped / scale.float()[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(-2)
    low, high = numbers.unflatten(-1, (-1, 2, 16)).unbind(-2)
    return Blocks((low | high << 4).flatten(-2), scale)


def bits(blocks: Blocks) -> float:
    """Return the bits for one weight, its share of the scales included."""
    return 8 * (blocks.weight.nbytes + blocks.scale.nbytes) / dequantize(blocks).numel()


whole = four_bits(row, row.shape[1])
small = four_bits(row, 32)
print("weights           ", *(f"{one:8.4f}" for one in row[0, :8].tolist()))
print("a scale per row   ", *(f"{one:8.4f}" for one in dequantize(whole)[0, :8].tolist()), f"  {bits(whole):.2f} bits")
print("a scale per 32    ", *(f"{one:8.4f}" for one in dequantize(small)[0, :8].tolist()), f"  {bits(small):.2f} bits")

# %% [markdown]
# ## Bytes and error, over all matrices


# %%
def error(rounded: dict[str, Tensor]) -> float:
    """Return the size of the error, as a part of the size of the weights (root mean square)."""
    missed = sum(float((rounded[name] - weight).square().sum()) for name, weight in matrices.items())
    return (missed / sum(float(weight.square().sum()) for weight in matrices.values())) ** 0.5


kinds = {
    "8 bits, a scale per row": ({name: eight_bits(one) for name, one in matrices.items()}, 8 + 16 / 160),
    "4 bits, a scale per 32": ({name: dequantize(four_bits(one, 32)) for name, one in matrices.items()}, 4.5),
    "4 bits, a scale per row": (
        {name: dequantize(four_bits(one, one.shape[1])) for name, one in matrices.items()},
        4.1,
    ),
}
errors = {name: error(rounded) for name, (rounded, _) in kinds.items()}
for name, (_, size) in kinds.items():
    print(f"{name:26} {size:4.1f} bits, error {errors[name]:.2%}")
assert list(errors.values()) == sorted(errors.values())
assert errors["8 bits, a scale per row"] < 0.01 < errors["4 bits, a scale per 32"]

# %% [markdown]
# ## What does the model say?
#
# An error of a weight is not yet an error of an answer. We save a copy of the model for each kind, with the rounded weights, and ask all of
# them the same: how likely is each token of these stories, and what is the answer to these questions? The *loss* is the mean surprise at
# a token (lower is better), the *shift* is how far the log-probability of a token has moved.


# %%
def model_with(rounded: dict[str, Tensor], source: Path = demo_model_path()) -> str:
    """Save a copy of a model, by default the demo model, with other weights."""
    folder = Path(tempfile.mkdtemp()) / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.gguf"))
    stored = load_file(source / "model.safetensors")
    save_file({**{name: weight.float() for name, weight in stored.items()}, **rounded}, folder / "model.safetensors")
    return str(folder)


questions = [f"What is the capital of {country}?" for country in ("Japan", "Peru", "Kenya", "Cuba", "Norway", "Egypt")]
questions += [f"What is {one} + {two}?" for one, two in ((7, 8), (3, 9), (12, 5), (6, 6))]
with LLM(str(demo_model_path()), dtype="float32", num_kv_blocks=256) as llm:
    story = SamplingParams(temperature=0.7, max_tokens=120, seed=1, n=6)
    [told] = llm.generate(chat("Tell me a story about a fox."), story, use_tqdm=False)
texts = [chat("Tell me a story about a fox.") + one.text for one in told.outputs]


def exam(folder: str) -> tuple[list[float], list[str]]:
    """Return the log-probability of each token of the stories, and the answers to the questions."""
    with LLM(folder, dtype="float32", num_kv_blocks=256) as llm:
        scored = llm.generate(texts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        short = SamplingParams(temperature=0, max_tokens=30)
        answers = llm.generate([chat(one) for one in questions], short, use_tqdm=False)
    logprobs = [entry.logprob for one in scored for entry in (one.prompt_logprobs or ())[17:] if entry is not None]
    return logprobs, [one.outputs[0].text for one in answers]


exact, right = exam(str(demo_model_path()))
print(f"{'16 bits, as trained':26} loss {-mean(exact):.4f}")
shifts = {}
for name, (rounded, size) in kinds.items():
    logprobs, answers = exam(model_with(rounded))
    shifts[name] = mean(abs(one - other) for one, other in zip(logprobs, exact, strict=True))
    same = sum(one == other for one, other in zip(answers, right, strict=True))
    print(
        f"{name:26} loss {-mean(logprobs):.4f}, shift {shifts[name]:.4f}, {same} of {len(right)} answers are the same"
    )

# %%
left, beside = new_chart(
    "Error of the weights", "Shift of the log-probabilities", size=(8.6, 3.0), x="bits for a weight"
)
for name, (_, size) in kinds.items():
    left.scatter(size, 100 * errors[name], s=70, label=name)
    beside.scatter(size, shifts[name], s=70, label=name)
left.set_ylabel("percent")
beside.legend(fontsize=8, loc="upper right")
for axes in (left, beside):
    axes.set(xlim=(3, 9), ylim=(0, None), xticks=[4, 5, 6, 7, 8])
picture([left, beside])

# %% [markdown]
# Half of the bytes are free: at eight bits nothing moves. At four bits the weights are off by a tenth, and the log-probabilities move; small
# groups keep both smaller, for half a bit more. The loss hardly changes, because the errors of many weights cancel out, and the answers stay:
# their likeliest token is far ahead of the second.

# %%
assert shifts["8 bits, a scale per row"] < 0.01
assert shifts["8 bits, a scale per row"] * 3 < min(shifts["4 bits, a scale per 32"], shifts["4 bits, a scale per row"])

# %% [markdown]
# ## A model that has words to lose
#
# The demo model knows its few sentences by heart. SmolLM2 has a hundred times its parameters, and general knowledge. In the folder of the
# repository, `pip install gguf && python -m tests.real.smollm2 smollm2` fetches it (100 MB); the variable `SMOLLM2` names another place.
# Without it, the next cell says so and goes on.

# %%
smollm2 = Path(os.environ.get("SMOLLM2", "../smollm2"))
ways = {
    "16 bits": lambda weight: weight,
    "8 bits, a scale per row": eight_bits,
    "4 bits, a scale per 32": lambda weight: dequantize(four_bits(weight, 32)),
    "4 bits, a scale per row": lambda weight: dequantize(four_bits(weight, weight.shape[1])),
}
if not smollm2.is_dir():
    print(f"SmolLM2 is not in {smollm2}")
    ways = {}
for name, way in ways.items():
    stored = load_file(smollm2 / "model.safetensors")
    layers = {key: weight.float() for key, weight in stored.items() if weight.ndim == 2 and "layers" in key}
    folder = model_with({key: way(weight) for key, weight in layers.items()}, smollm2)
    with LLM(folder, dtype="bfloat16", num_kv_blocks=64, max_model_len=512) as llm:
        question = [{"role": "user", "content": "Why do leaves turn yellow in autumn?"}]
        [said] = llm.chat(question, SamplingParams(temperature=0, max_tokens=50), use_tqdm=False)
    print(f"{name}: {said.outputs[0].text}\n")
    shutil.rmtree(folder)

# %% [markdown]
# Eight bits choose other words of the same sense. Four bits in small groups still write sentences, and know less. With one scale for a whole row,
# the text goes in circles.
#
# ## What you have seen
#
# - A quantized weight is a small number times a shared scale. The step, so the error, is as wide as the largest weight of the group needs.
# - Eight bits with a scale for each row cost next to nothing. At four bits the size of the group matters.
#
# `--quantization int8` rounds any model on load. Files of 4 bits (GGUF, AWQ, GPTQ) are computed as they are stored; see
# [Memory and quantization](../docs/memory.md).
