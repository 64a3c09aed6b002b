"""The whole engine compared with transformers' continuous batching: the same random weights, greedy, in turn.

A decode step is also set against its byte floor: every weight and the context's keys and values read once.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file

from tools.kernel_lab.benches import Target
from tools.kernel_lab.device import Device
from tools.kernel_lab.measure import against
from tools.kernel_lab.peers import quiet
from tools.kernel_lab.phases import Skip
from trio_llm.demo import demo_model_path
from trio_llm.llm import LLM
from trio_llm.params import SamplingParams

# Qwen3-0.6B; the demo model's own shape, which is of the same family, stands in for it when simulated.
SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}  # fmt: skip
TARGETS = {1: Target("of floor", 0.35, 0.5), 32: Target("of floor", 0.65, 0.8)}
PROMPT, FEW, MANY = 128, 16, 144  # tokens
WARM_UPS = 2


@attrs.frozen
class Run:
    """A batch of sequences on a model of random weights."""

    model: Path
    batch: int
    device: Device
    lengths: tuple[int, int, int]  # prompt, and the two numbers of outputs

    @property
    def prompts(self) -> list[list[int]]:
        return [[3 + (7 * row + 3 * i) % 1000 for i in range(self.lengths[0])] for row in range(self.batch)]

    @property
    def floor_bytes(self) -> float:
        """Bytes that a step must read halfway between the two numbers of outputs."""
        config = json.loads((self.model / "config.json").read_text())
        weights = (self.model / "model.safetensors").stat().st_size
        context = self.lengths[0] + sum(self.lengths[1:]) / 2
        entry = 2 * config["num_key_value_heads"] * config["head_dim"] * 2
        return weights + self.batch * context * entry * config["num_hidden_layers"]


def items(device: Device, ceilings: Mapping[str, float]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield what to run: each batch size, on a checkpoint in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(Path(folder), {} if device.sim else SHAPE)
        lengths = (9, 2, 4) if device.sim else (PROMPT, FEW, MANY)
        for batch in (2,) if device.sim else (1, 32):
            yield f"decode step, B={batch}", lambda b=batch: compare(Run(model, b, device, lengths), ceilings)


def write_checkpoint(folder: Path, shape: dict[str, int]) -> Path:
    """Write a checkpoint of the demo model's family with random weights of bfloat16."""
    demo = demo_model_path()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    config = {**json.loads((demo / "config.json").read_text()), **shape}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(dict(_weights(config)), folder / "model.safetensors", {"format": "pt"})
    return folder


def _weights(config: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, width, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return (torch.randn(outputs, inputs) * inputs**-0.5).bfloat16()

    yield "model.embed_tokens.weight", matrix(config["vocab_size"], hidden)
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    shapes = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden),
              "mlp.down_proj": (hidden, width)}  # fmt: skip
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", matrix(*shape)
        for name, size in norms.items():
            yield f"model.layers.{layer}.{name}.weight", torch.ones(size, dtype=torch.bfloat16)


def compare(run: Run, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Measure one batch size on both engines."""
    ours_us, ours = _ours(run)
    run.device.release()
    floor_us = run.floor_bytes / ceilings["read_gb_s"] / 1e3
    found: dict[str, Any] = {"us": ours_us, "floor_us": floor_us, "of_floor": floor_us / ours_us}
    if target := TARGETS.get(run.batch):
        found |= against(target, found, {})
    found["tokens_s"] = run.batch / ours_us * 1e6
    try:
        with quiet():
            theirs_us, theirs = _transformers(run)
        same = sum(a == b for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True))
        peer: dict[str, Any] = {"us": theirs_us, "times_faster": theirs_us / ours_us}
        peer["same tokens"] = same / sum(map(len, ours))
    except Exception as reason:  # noqa: BLE001 - a peer that is not to be had is written down
        peer = {"failure": f"{type(reason).__name__}: {reason}"[:300]}
    return {**found, "peers": {"transformers' continuous batching": peer}}


def _ours(run: Run) -> tuple[float, list[tuple[int, ...]]]:
    """Return microseconds of a step, from what more outputs cost more, and the longer outputs."""
    prompt, few, many = run.lengths
    blocks = run.batch * (-(-(prompt + many) // 16) + 1) + 8
    settings = {"num_kv_blocks": blocks, "max_batch_size": run.batch, "enable_prefix_caching": False}
    device = run.device.torch_device.type
    dtype = "float32" if run.device.sim else "bfloat16"
    with LLM(str(run.model), device=device, dtype=dtype, **settings) as llm:
        given = [{"prompt_token_ids": ids} for ids in run.prompts]

        def timed(count: int) -> tuple[float, list[tuple[int, ...]]]:
            begin = time.perf_counter()
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            outputs = llm.generate(given, params, use_tqdm=False)
            return time.perf_counter() - begin, [tuple(one.outputs[0].token_ids) for one in outputs]

        for _ in range(1 if run.device.sim else WARM_UPS):
            timed(few)
        seconds, tokens = timed(many)
        if run.device.sim:
            return float("nan"), tokens
        short = statistics.median(timed(few)[0] for _ in range(3))
        long = statistics.median([seconds, *(timed(many)[0] for _ in range(2))])
        return (long - short) / (many - few) * 1e6, tokens


def _transformers(run: Run) -> tuple[float, list[list[int]]]:
    """Return microseconds between two tokens of a sequence, and the outputs."""
    try:
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
    except ImportError:
        raise Skip("no transformers here") from None
    dtype = torch.float32 if run.device.sim else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(run.model, dtype=dtype, local_files_only=True)
    model.to(run.device.torch_device).eval()
    count = run.lengths[2]
    config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # On a GPU it sizes its cache and its batches itself; on a CPU it would fill the memory.
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64) if run.device.sim else None
    outputs = list(model.generate_batch(run.prompts, config, small, record_timestamps=True).values())
    del model
    gc.collect()
    run.device.release()
    if len(outputs) != run.batch or any(one.error for one in outputs):
        raise RuntimeError(f"it failed: {[one.error for one in outputs]}")
    times = [one.timestamps or [] for one in outputs]
    steps = [(stamps[-1] - stamps[0]) / (count - 1) for stamps in times]
    us = float("nan") if run.device.sim else statistics.median(steps) * 1e6
    return us, [one.generated_tokens for one in outputs]
