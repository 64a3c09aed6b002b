"""A loop of your own round the parts that the server is made of: ask, reserve, plan, run, commit.

No event loop, no thread. A policy, a cache or a runner of your own takes the place of one of the parts.
"""

from trio_llm.config import EngineConfig
from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.demo import demo_model_path
from trio_llm.messages import Finished, Tokens
from trio_llm.model.load import load_runner
from trio_llm.params import SamplingParams, Submission
from trio_llm.tokenizer import Tokenizer

PROMPTS = ["The capital of France is", "Once upon a time, there was a", "The little owl"]

tokenizer = Tokenizer.from_directory(demo_model_path())
runner = load_runner(EngineConfig(model=str(demo_model_path()), num_kv_blocks=64))
blocks = BlockManager(num_blocks=runner.info.num_kv_blocks, groups=runner.info.kv_groups, secret=b"at most 64 bytes")
scheduler = Scheduler(
    max_num_batched_tokens=32,
    max_batch_size=2,  # The third prompt waits until one of the first two has ended.
    max_model_len=blocks.max_tokens(),
    eos_token_ids=runner.info.eos_token_ids,
)

for request_id, prompt in enumerate(PROMPTS):
    scheduler.submit(
        request_id, Submission(tokenizer.encode(prompt), SamplingParams(temperature=0, seed=0, max_tokens=12))
    )

answers: dict[int, list[int]] = {request_id: [] for request_id in range(len(PROMPTS))}
while (ask := scheduler.ask()) is not None:
    grant = blocks.reserve(ask)
    plan = scheduler.plan(grant)
    if plan is None:  # The step only handed blocks back.
        continue
    commit = scheduler.commit(runner.step(plan))
    print(f"step {plan.step}: rows {plan.request_ids} compute {plan.counts} tokens, {blocks!r}")
    for request_id, event in commit.events:
        match event:
            case Tokens(token_ids):
                answers[request_id] += token_ids
            case Finished(reason):
                print(f"  {PROMPTS[request_id]!r} ends ({reason}): {tokenizer.decode(answers[request_id])!r}")
            case _:
                pass
runner.close()
