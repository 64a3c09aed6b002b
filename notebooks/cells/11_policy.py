# %% [markdown]
# # Your own scheduling policy, and two judges
#
# Who goes first when there is not room for all? That is a *policy*. In this notebook you write one in a few lines, and the judges that
# hold the real scheduler hold yours, too: the **invariants**, checked after every verb, and the **exact oracle**, a model whose answers
# are wrong as soon as one block is.
#
# The judges are the project's own tests, so this notebook needs a clone of the repository.

# %%
import random
import sys
from collections.abc import Callable
from statistics import mean

from trio_llm.core.scheduler import Scheduler
from trio_llm.notebook.charts import new_chart, picture
from trio_llm.params import SamplingParams, Submission

sys.path.insert(0, "..")  # The tests are not part of the installed package.
from tests.core.loop import EOS, FULL, Loop, prompt_of
from tests.core.test_oracle import simulate

# %% [markdown]
# ## The policy is a number
#
# The scheduler keeps its queue sorted by *level*, smaller first, and by arrival where levels are equal. `level_of` gives a request its
# level when it arrives. First come, first served is the same level for all. Here is one that prefers short prompts:


# %%
class ShortestFirst(Scheduler):
    """Short prompts go before long ones."""

    def level_of(self, submission: Submission) -> int:
        return super().level_of(submission) + len(submission.prompt_token_ids)


# %% [markdown]
# ## A crowd
#
# `Loop` is the whole core with the oracle as its model: real scheduler, real block manager. We put a scheduler into it and send a crowd:
# in each step a request or two, most of them short, some long. We write down how many steps each one waits for its first row.


# %%
def loop_with(kind: type[Scheduler], num_blocks: int = 64) -> Loop:
    """Return a loop with another scheduler in it."""
    loop = Loop(FULL, num_blocks=num_blocks, budget=16, max_batch_size=4)
    loop.scheduler = kind(
        max_num_batched_tokens=16, max_batch_size=4, max_model_len=loop.max_model_len, eos_token_ids=EOS
    )
    return loop


def crowd(kind: type[Scheduler], seed: int = 1) -> dict[int, list[int]]:
    """Return for each length of a prompt the steps that such requests waited."""
    rng, loop = random.Random(seed), loop_with(kind)
    arrived: dict[int, int] = {}
    waits: dict[int, list[int]] = {}
    step = 0
    while step < 60 or loop.busy:
        for _ in range(rng.randrange(1, 3) if step < 60 else 0):
            length = rng.choice([4, 6, 8, 30])
            number = loop.submit(prompt_of(length, seed=rng.randrange(1000)), SamplingParams(max_tokens=4))
            arrived[number] = step
        plan = loop.step()
        for request_id in plan.request_ids if plan else ():
            if request_id in arrived:
                waits.setdefault(len(loop.clients[request_id].prompt), []).append(step - arrived.pop(request_id))
        step += 1
    loop.check_drained()
    return waits


def show(kinds: dict[str, type[Scheduler]]) -> dict[str, dict[int, list[int]]]:
    """Return the waits of each policy."""
    found = {name: crowd(kind) for name, kind in kinds.items()}
    print(f"{'steps waited':20} {'all, mean':>10} {'short, mean':>12} {'long, mean':>11} {'longest':>8}")
    for name, waits in found.items():
        everybody = [wait for group in waits.values() for wait in group]
        short = [wait for length, group in waits.items() if length < 30 for wait in group]
        print(f"{name:20} {mean(everybody):10.1f} {mean(short):12.1f} {mean(waits[30]):11.1f} {max(everybody):8}")
    return found


found = show({"first come": Scheduler, "shortest first": ShortestFirst})

# %% [markdown]
# The short ones fly, and the mean is much better. But look at the last column: as long as short ones keep coming, a long one waits and
# waits. That is *starvation*.
#
# ## Let them grow old
#
# A waiting request should move forward as time goes by. A level that changes would need the queue to be sorted again and again. There is a
# better way: let later arrivals begin further *behind*. Each arrival adds to the level, so a long prompt is only overtaken by so many.


# %%
class ShortestFirstWithAge(Scheduler):
    """Short prompts go first, but nobody is overtaken by more than a few."""

    def level_of(self, submission: Submission) -> int:
        return super().level_of(submission) + len(submission.prompt_token_ids) + self._num_arrivals


kinds = {"first come": Scheduler, "shortest first": ShortestFirst, "with age": ShortestFirstWithAge}
found = show(kinds)
[axes] = new_chart("Who waits how long", x="policy", y="steps until the first row", size=(7.6, 3.2))
for at, waits in enumerate(found.values()):
    for offset, (colour, lengths, label) in enumerate(
        (("#3b7dd8", (4, 6, 8), "short prompts"), ("#d07a1f", (30,), "long prompts"))
    ):
        group = [wait for length in lengths for wait in waits[length]]
        spread = [at + 0.36 * offset - 0.3 + 0.24 * place / len(group) for place in range(len(group))]
        axes.scatter(spread, group, s=12, color=colour, alpha=0.7, label=label if at == 0 else None)
        axes.hlines(mean(group), at + 0.36 * offset - 0.32, at + 0.36 * offset - 0.04, color=colour, linewidth=2)
axes.set_xticks(range(len(found)), list(found))
axes.legend(fontsize=8, loc="upper right")
picture([axes])

# %% [markdown]
# Each dot is a request, each bar a mean. With age, the short ones still wait less than in the order of arrival, and no long one is
# forgotten.

# %%
longest = {name: max(wait for group in waits.values() for wait in group) for name, waits in found.items()}
means = {name: mean(wait for group in waits.values() for wait in group) for name, waits in found.items()}
assert means["shortest first"] < means["with age"] < means["first come"]
assert longest["with age"] < longest["shortest first"]

# %% [markdown]
# ## The judges
#
# A policy may be unfair. It must never be *wrong*. `simulate` drives the loop with random requests that share prefixes, are aborted, fail,
# and are preempted in a pool that is too small. After every verb the loop checks what must be true: each block has one state and as many
# owners as it counts, nobody writes where somebody else reads, nobody is overtaken within the order, the budget is kept. And each answer
# must be the one that the request gets alone: the oracle's next token is a hash of every slot that it reads through the block table.


# %%
def judge(kind: type[Scheduler], runs: int = 12) -> str:
    """Return what the judges say."""
    preempted = 0
    for seed in range(runs):
        loop = loop_with(kind, num_blocks=12)
        try:
            simulate(seed, loop, num_requests=15, aborts=0.1, failures=0.05)
        except Exception as error:
            return f"GUILTY in run {seed}, step {len(loop.plans)}: {type(error).__name__} {str(error).splitlines()[:1]}"
        preempted += sum(stats.num_preempted for stats in loop.stats)
    return f"not guilty: {runs} runs, {preempted} preemptions, every answer exact"


verdicts = {name: judge(kind) for name, kind in kinds.items()}
for name, verdict in verdicts.items():
    print(f"{name:16} {verdict}")
assert all(verdict.startswith("not guilty") for verdict in verdicts.values())

# %% [markdown]
# ## Can they find a fault?
#
# A judge who never says *guilty* is worth nothing. Here is a policy that somebody might write in a hurry: sort the queue by length just
# before each step. It looks right, and runs. But the queue is searched by its own order, so sorting it makes the scheduler take out the
# wrong request:


# %%
class Hurried(Scheduler):
    """Sorts what it does not own."""

    def ask(self, prompt_tokens: int | None = None):
        self._queues.waiting.sort(key=lambda sequence: len(sequence.prompt))
        return super().ask(prompt_tokens)


verdict = judge(Hurried)
print(verdict)
assert verdict.startswith("GUILTY")

# %% [markdown]
# ## What you have seen
#
# - A policy is a level at arrival; order, admission and preemption follow from it. The server's own `--scheduling-policy priority` is one.
# - Starvation is a property of the policy, and an age in the level cures it without sorting anything again.
# - Correctness is not the policy's business, and is checked for any of them: `tests/core/loop.py` holds the invariants, `hash_model.py` the
#   oracle. To try your policy on a real load, open a record (`10_incident`).
