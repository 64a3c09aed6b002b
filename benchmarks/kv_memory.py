"""What one long sequence owns of each kind of KV group while it grows, and what a pool takes in bfloat16 and INT8.

The real scheduler, block manager and runner; random weights. All that decides about KV is as in Gemma 4 E2B (35 layers,
20 of them sharing, one KV head of 256 or 512, a window of 512) and in Mistral (KV heads of 128, a window in every
layer), or cut down with its proportions; the rest is narrow. Bytes are read off the pool's own tensors, and off the
process once all of the pool was written.

    python benchmarks/kv_memory.py
"""

from __future__ import annotations

from typing import Any

import torch
from models import loaded, machine, resident_bytes

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams, Submission

PROMPT_TOKENS, OUTPUT_TOKENS, CHUNK = 4032, 64, 128
SHOWN = (128, 512, 1024, 2048, 4032, 4095)
POOL_BYTES = 256 * 2**20
NARROW = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "Gemma 4 E2B": {
        **NARROW,
        "architectures": ["Gemma4ForCausalLM"],
        "num_hidden_layers": 35,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 512,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        },
    },
    "Mistral": {
        **NARROW,
        "architectures": ["MistralForCausalLM"],
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "sliding_window": 512,
        "rope_theta": 1e4,
    },
}


def grow(runner: Runner) -> dict[int, tuple[int, ...]]:
    """Run one long sequence; return, after so many computed tokens, the blocks owned per group."""
    info = runner.info
    blocks = BlockManager(num_blocks=info.num_kv_blocks, groups=info.kv_groups, secret=b"", max_step_tokens=CHUNK)
    scheduler = Scheduler(
        max_num_batched_tokens=CHUNK, max_batch_size=1, max_model_len=info.max_model_len, eos_token_ids=()
    )
    prompt = [i * 7 % 251 for i in range(PROMPT_TOKENS)]
    scheduler.submit(0, Submission(prompt, SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS)))
    owned: dict[int, tuple[int, ...]] = {}
    while (ask := scheduler.ask()) is not None:
        grant = blocks.reserve(ask)
        if (plan := scheduler.plan(grant)) is not None:
            owned[plan.starts[0] + plan.counts[0]] = grant.stats.used_blocks
            scheduler.commit(runner.step(plan))
    return owned


def report_growth(name: str) -> None:
    """Print blocks and bytes by length, window groups apart from full ones."""
    with loaded(SHAPES[name], dtype="bfloat16", num_kv_blocks=4096, max_num_batched_tokens=CHUNK) as runner:
        owned, groups = grow(runner), runner.info.kv_groups
        block_bytes = runner.info.block_bytes
    kinds = [("full", [i for i, group in enumerate(groups) if group.window is None])]
    kinds.append(("window", [i for i, group in enumerate(groups) if group.window is not None]))
    kinds = [(kind, indices) for kind, indices in kinds if indices]
    heads = " | ".join(
        f"blocks of {len(indices)} {kind} group{'s' * (len(indices) > 1)} | MiB" for kind, indices in kinds
    )
    print(f"\n| {name}, tokens | {heads} | MiB if nothing left a window |")
    print("|---" * (2 * len(kinds) + 2) + "|")
    for tokens in SHOWN:
        cells = [sum(owned[tokens][i] for i in indices) for _, indices in kinds]
        everything = sum(-(-tokens // group.block_size) for group in groups) * block_bytes
        row = [f"{cell} | {cell * block_bytes / 2**20:.2f}" for cell in cells]
        print(f"| {tokens:,} | {' | '.join(row)} | {everything / 2**20:.2f} |")


def pool_bytes(name: str, *, int8: bool) -> tuple[int, int, int]:
    """Return a pool's blocks, the bytes of its tensors, and by how much the process grows when they are written."""
    with loaded(SHAPES[name], dtype="bfloat16", num_kv_blocks=4, kv_quantization=int8) as runner:
        dense = runner.info.block_bytes
    num_blocks = POOL_BYTES // dense
    with loaded(SHAPES[name], dtype="bfloat16", num_kv_blocks=num_blocks, kv_quantization=int8) as runner:
        tensors = [part for layer in runner._kv.layers for part in (layer.k, layer.v, layer.k_scale, layer.v_scale)]
        storages = {part.data_ptr(): part.untyped_storage() for part in tensors if part is not None}
        before = resident_bytes()
        for storage in storages.values():
            torch.tensor([], dtype=torch.uint8).set_(storage).fill_(1)
        return num_blocks, sum(storage.nbytes() for storage in storages.values()), resident_bytes() - before


def report_bytes() -> None:
    """Print bytes per block in both types, by tensors and by what the process grew."""
    print("\n| model | KV | blocks | bytes of the tensors | growth of the process | bytes a block | of bf16 |")
    print("|---|---|---|---|---|---|---|")
    for name in SHAPES:
        dense = 0.0
        for kind in ("bfloat16", "INT8"):
            num_blocks, allocated, resident = pool_bytes(name, int8=kind == "INT8")
            dense = dense or allocated / num_blocks
            per_block = allocated / num_blocks
            print(
                f"| {name} | {kind} | {num_blocks:,} | {allocated:,} | {resident:,} | {per_block:,.0f} "
                f"| {per_block / dense:.1%} |"
            )


def main() -> None:
    """Print both tables."""
    print(machine())
    for name in SHAPES:
        report_growth(name)
    report_bytes()


if __name__ == "__main__":
    main()
