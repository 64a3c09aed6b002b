# %% [markdown]
# # A CUDA kernel, instruction by instruction, without a GPU
#
# On a GPU, a kernel is one program that thousands of threads run. Thirty-two of them are a **warp**: they execute the same instruction at
# the same time, each with registers of its own. The project's kernels are tested in a simulator, which runs the *PTX* that NVIDIA's compiler
# makes of them, on a CPU. So a kernel can be stopped at any instruction. Here you watch one: RMSNorm, which every layer begins with.
#
# The simulator is part of the repository, not of the package, so this notebook needs a clone, and a compiler: `pip install nvidia-cuda-nvrtc`.

# %%
import sys
from collections import Counter

import torch

from cuda_kernels import norm
from cuda_kernels.launch import using
from trio_llm.notebook.charts import new_chart, picture

sys.path.insert(0, "..")  # The simulator is not part of the installed package.
from tools.ptx_simulator import SimulatedLauncher, launcher
from tools.ptx_simulator.counters import Counters
from tools.ptx_simulator.program import Register

# %% [markdown]
# ## Run it
#
# RMSNorm divides a row by the root of its mean square: $y_i = x_i / \sqrt{\operatorname{mean}(x^2) + \epsilon}$. One row of 256 numbers, and
# what PyTorch makes of it:

# %%
torch.manual_seed(0)
x = torch.randn(1, 256).bfloat16()
expected = x.double() * (x.double().square().mean() + 1e-6).rsqrt()

counters = Counters()
with using(SimulatedLauncher(counters=counters)):
    y = norm.rms_norm(x, None, 1e-6)
print("kernel ", [round(value, 4) for value in y[0, :6].tolist()])
print("PyTorch", [round(value, 4) for value in expected[0, :6].tolist()])
assert torch.allclose(y.double(), expected, rtol=2**-7)

# %% [markdown]
# ## Watch it
#
# The simulator turns each instruction into a Python function over 32 lanes. We put a spy before each: it writes down the instruction and, after
# it, what the first lanes have in the register that it wrote.

# %%
steps: list[tuple[str, str, list[float]]] = []


def spied(prepare):
    """Return `prepare` with a spy around each instruction."""

    def prepared(ptx: str, entry: str):
        program, code = prepare(ptx, entry)
        return program, tuple(operate and watch(operate, ins) for operate, ins in zip(code, program.instructions))

    def watch(operate, instruction):
        def run(machine, lanes) -> None:
            operate(machine, lanes)
            first = instruction.operands[0] if instruction.operands else None
            values: list[float] = []
            if isinstance(first, Register) and machine.registers[first.name].dtype == "u4":
                values = machine.registers[first.name][lanes].view("f4").tolist()
            steps.append((instruction.opcode, instruction.text, values))

        return run

    return prepared


launcher._prepare, original = spied(launcher._prepare), launcher._prepare
with using(SimulatedLauncher()):
    assert torch.equal(norm.rms_norm(x, None, 1e-6), y)
launcher._prepare = original

kinds = Counter(opcode for opcode, *_ in steps)
print(len(steps), "instructions for each warp:", dict(kinds.most_common(10)))
for opcode, text, values in steps[:14]:
    print(f"{text:44}", [f"{value:.3g}" for value in values[:4]] if ".f32" in text else "")

# %% [markdown]
# ## The sum of 32 lanes in five steps
#
# Each thread has squared and added its own eight numbers. Now the warp needs the sum over all its threads, and no thread sees another's
# registers. `shfl.sync.bfly` lets each lane read a register of the lane whose number differs in one bit: 16 away, then 8, 4, 2, 1. After each
# exchange every lane adds what it got:

# %%
first = next(at for at, (opcode, *_) in enumerate(steps) if opcode == "shfl")
adds = []
for at, (opcode, text, values) in enumerate(steps):
    if opcode == "shfl" and len(adds) < 5:
        print(text)
        after = next(step for step in steps[at + 1 :] if step[0] == "add")
        print("   ", after[1], [f"{value:.1f}" for value in after[2][:4]], "…")
        adds.append(after[2])
own = next(step for step in reversed(steps[:first]) if step[0] in ("fma", "add", "mul") and len(step[2]) == 32)[2]

[axes] = new_chart(
    "What each lane holds, after each exchange", x="lane of the warp", y="sum of squares", size=(7.6, 3.2)
)
for number, values in enumerate([own, *adds]):
    name = "its own eight" if number == 0 else f"after step {number}"
    axes.plot(range(len(values)), values, marker="o", markersize=3, label=name, alpha=0.9)
axes.set_ylim(0, 330)
axes.legend(fontsize=8, loc="upper left", ncols=3)
picture([axes])

# %% [markdown]
# From bottom to top: after each step, twice as many lanes agree, and their sums double. After five, all 32 hold the sum of all. No memory was
# touched, and nobody waited.

# %%
total = float(x.double().square().sum())
print(f"every lane: {adds[-1][0]:.4f}, PyTorch: {total:.4f}")
assert len(set(adds[-1])) == 1 and abs(adds[-1][0] - total) < 1e-3 * total
assert [len(set(values)) for values in (own, *adds)][-1] == 1

# %% [markdown]
# ## What it reads and writes
#
# Memory comes in *sectors* of 32 bytes. If the lanes of a warp read neighbours, few sectors are enough; if they are scattered, each lane costs one.
# The simulator counts both, and the smallest number that would do:

# %%
print("sectors moved:", dict(counters.sectors), " the least possible:", dict(counters.sectors_least))
assert counters.sectors == counters.sectors_least
assert sum(counters.sectors.values()) == 2 * 256 * 2 // 32, "each number is read once and written once"

# %% [markdown]
# ## What you have seen
#
# - A warp is 32 lanes that run one instruction; a shuffle lets them exchange registers.
# - A kernel that is limited by memory is good when it moves each byte once. Here it does.
# - What the simulator cannot tell is the time. `python -m tools.kernel_lab bench` measures on a GPU.
#
# The kernel: `cuda_kernels/norm.cu`. The simulator: `tools/ptx_simulator`.
