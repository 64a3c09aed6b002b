"""Decode and prefill on a CPU, ours beside every installed peer: `python benchmarks/cpu.py [DIR] [--gguf FILE]`.

A checkpoint is measured with transformers and vLLM's CPU build too, a GGUF file with llama.cpp, each on the very same
weights.
Each engine runs in a process of its own with the same number of threads; rounds are interleaved, so what else the
machine does meets all alike. Figures are medians with their range over the rounds, beside the read bandwidth and the
arithmetic that were measured in the same run. A machine that is busy gives figures that mean nothing: they are refused
unless asked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROWS = (1, 8, 32)
PROMPTS = (512, 2048)
DECODES = 24
CONTEXT = 40
BUSY = 0.25  # load per core above which a machine is called busy (a guess)
OURS = {"fp32": ("float32", None), "bf16": ("bfloat16", None), "int8": ("bfloat16", "int8")}
GGUF_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by the end of a file's name; others: auto
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
SEQUENCES = max(ROWS)
STARTED = time.time()


def measure_ours(model: str, kind: str, threads: int) -> dict[str, Any]:
    """Load, then time steps of the runner alone: prompts, and decodes of 1, 8 and 32 rows."""
    from trio_llm.config import EngineConfig
    from trio_llm.messages import Admission, StepPlan
    from trio_llm.model.load import load_runner
    from trio_llm.params import SamplingParams

    began = time.perf_counter()
    of_file = GGUF_DTYPES.get(Path(model).stem.rpartition(".")[2], "auto")
    dtype, quantization = OURS.get(kind, (of_file, None))
    settings: Any = {"quantization": quantization} if quantization else {}
    config = EngineConfig(
        model=model, dtype=dtype, device="cpu", num_kv_blocks=600, max_batch_size=32, cpu_threads=threads, **settings
    )
    runner, budget = load_runner(config), config.decided(on_gpu=False).step_tokens
    found: dict[str, Any] = {"load s": time.perf_counter() - began, "bytes": runner.budget.weight_bytes}
    params, block = SamplingParams(temperature=0), runner.info.kv_groups[0].block_size
    step = 0

    def run(rows: int, start: int, count: int, *, first: bool) -> float:
        """Compute `count` tokens of each row from `start` on, in steps as the scheduler makes them."""
        nonlocal step
        ids, width = tuple(range(rows)), -(-(CONTEXT + DECODES if count < 512 else count) // block)
        tokens = tuple(5 + i % (runner.info.vocab_size - 5) for i in range(count))
        admitted = tuple(Admission(i, tokens, count, params) for i in ids) if first else ()
        blocks = tuple(((0, tuple(range(1 + i * width, 1 + (i + 1) * width))),) if first else () for i in ids)
        plans: list[StepPlan] = []
        for done in range(0, count, budget // rows):
            step += 1
            chunk = tokens[done : done + budget // rows]
            starts, counts, samples = (start + done,) * rows, (len(chunk),) * rows, (done + len(chunk) == count,) * rows
            news = ((), (), ((),) * rows) if done else (ids if first else (), admitted, blocks)
            plans.append(StepPlan(step, news[0], news[1], ids, starts, counts, chunk * rows, samples, news[2]))
        at = time.perf_counter()
        for plan in plans:
            runner.step(plan)
        return time.perf_counter() - at

    run(1, 0, CONTEXT, first=True)
    found["first token s"] = time.time() - STARTED
    for length in PROMPTS:
        found[f"prefill {length}"] = length / min(run(1, 0, length, first=True) for _ in range(2))
    for rows in ROWS:
        run(rows, 0, CONTEXT, first=True)
        times = [run(rows, CONTEXT + i, 1, first=False) for i in range(DECODES)]
        found[f"decode {rows}"] = rows / statistics.median(times[2:])
    count = found["bytes"] / BYTES[kind] if kind in BYTES else _count_parameters(model)
    found["products"] = count - runner.info.vocab_size * runner.info.hidden_size
    return found


def _count_parameters(file: str) -> int:
    """Return how many numbers the tensors of a GGUF file stand for. gguf's own reader would count as peak memory."""
    from trio_llm.gguf.header import read_gguf

    return sum(math.prod(tensor.shape) for tensor in read_gguf(Path(file)).tensors.values())


def measure_transformers(model: str, kind: str, threads: int) -> dict[str, Any]:
    """Time transformers' forward with its own cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    began = time.perf_counter()
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, OURS[kind][0]))
    found: dict[str, Any] = {"load s": time.perf_counter() - began}
    count = sum(parameter.numel() for parameter in loaded.parameters())
    found |= {
        "bytes": count * BYTES[kind],
        "products": count - loaded.config.vocab_size * loaded.config.hidden_size,
    }
    with torch.inference_mode():
        loaded(torch.arange(5, 5 + CONTEXT)[None], logits_to_keep=1)
        found["first token s"] = time.time() - STARTED
        for length in PROMPTS:
            ids, times = torch.arange(5, 5 + length)[None], []
            for _ in range(2):
                at = time.perf_counter()
                loaded(ids, logits_to_keep=1)
                times.append(time.perf_counter() - at)
            found[f"prefill {length}"] = length / min(times)
        for rows in ROWS:
            out = loaded(torch.arange(5, 5 + CONTEXT).repeat(rows, 1), use_cache=True)
            times = []
            for _ in range(DECODES):
                at = time.perf_counter()
                out = loaded(torch.full((rows, 1), 7), past_key_values=out.past_key_values, use_cache=True)
                times.append(time.perf_counter() - at)
            found[f"decode {rows}"] = rows / statistics.median(times[2:])
    return found


def measure_llama_cpp(model: str, __: str, threads: int) -> dict[str, Any]:
    """Time llama.cpp's batches through llama-cpp-python's bindings, one sequence per row."""
    llama_cpp: Any = importlib.import_module("llama_cpp")

    llama_cpp.llama_backend_init()
    began = time.perf_counter()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 9600, max(PROMPTS), 512
    settings.n_seq_max, settings.n_threads, settings.n_threads_batch = SEQUENCES, threads, threads
    settings.kv_unified, settings.flash_attn_type = True, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama_cpp.llama_init_from_model(loaded, settings)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    hidden, count = llama_cpp.llama_model_n_embd(loaded), llama_cpp.llama_model_n_params(loaded)
    found: dict[str, Any] = {"load s": time.perf_counter() - began}
    found |= {"bytes": llama_cpp.llama_model_size(loaded), "products": count - vocab * hidden}
    batch = llama_cpp.llama_batch_init(max(PROMPTS), 0, 1)

    def run(rows: int, start: int, count: int) -> float:
        """Compute `count` tokens of each sequence from the position `start` on, at most one with logits."""
        batch.n_tokens = rows * count
        for i in range(rows * count):
            row, offset = divmod(i, count)
            batch.token[i], batch.pos[i] = 5 + offset, start + offset
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, row, offset == count - 1
        at = time.perf_counter()
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        for row in range(rows):  # the choice of a token is part of a step
            llama_cpp.llama_get_logits_ith(context, row * count + count - 1)
        return time.perf_counter() - at

    def forget() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    run(1, 0, CONTEXT)
    found["first token s"] = time.time() - STARTED
    for length in PROMPTS:
        times: list[float] = []
        for _ in range(2):
            forget()
            times.append(run(1, 0, length))
        found[f"prefill {length}"] = length / min(times)
    for rows in ROWS:
        forget()
        run(rows, 0, CONTEXT)
        times = [run(rows, CONTEXT + i, 1) for i in range(DECODES)]
        found[f"decode {rows}"] = rows / statistics.median(times[2:])
    return found


def measure_vllm(model: str, kind: str, _: int) -> dict[str, Any]:
    """Time vLLM's answers: prompts by answers of one token, decodes by what more tokens add. OMP_NUM_THREADS rules."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    vllm: Any = importlib.import_module("vllm")
    began = time.perf_counter()
    loaded = vllm.LLM(
        model,
        dtype=OURS[kind][0],
        max_model_len=2 * max(PROMPTS),
        max_num_batched_tokens=2 * max(PROMPTS),
        max_num_seqs=SEQUENCES,
        enable_prefix_caching=False,
    )
    found: dict[str, Any] = {"load s": time.perf_counter() - began}
    sizes: list[int] = []
    for path in Path(model).glob("*.safetensors"):
        with path.open("rb") as file:
            tensors: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        sizes += [math.prod(tensor["shape"]) for name, tensor in tensors.items() if name != "__metadata__"]
    config = json.loads(Path(model, "config.json").read_text())
    found |= {
        "bytes": sum(sizes) * BYTES[kind],
        "products": sum(sizes) - config["vocab_size"] * config["hidden_size"],
    }

    def run(rows: int, length: int, count: int) -> float:
        """Return the least time of three in which `rows` prompts get answers of `count` tokens."""
        prompts = [{"prompt_token_ids": list(range(5 + row, 5 + row + length))} for row in range(rows)]
        params = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        times: list[float] = []
        for _ in range(3):
            at = time.perf_counter()
            loaded.generate(prompts, params, use_tqdm=False)
            times.append(time.perf_counter() - at)
        return min(times)

    run(1, CONTEXT, 1)
    found["first token s"] = time.time() - STARTED
    found |= {f"prefill {length}": length / run(1, length, 1) for length in PROMPTS}
    for rows in ROWS:
        found[f"decode {rows}"] = rows * DECODES / (run(rows, CONTEXT, 1 + DECODES) - run(rows, CONTEXT, 1))
    return found


ENGINES = {
    "ours": measure_ours,
    "transformers": measure_transformers,
    "vLLM": measure_vllm,
    "llama.cpp": measure_llama_cpp,
}


def measure_machine(_: str, __: str, threads: int) -> dict[str, Any]:
    """Read 512 MiB and multiply matrices of float32 with every thread; return GB/s and GFLOP/s, the best of several."""
    import torch

    torch.set_num_threads(threads)
    data, square = torch.zeros(2**27), torch.ones(2048, 2048)

    def best(work: Callable[[], object]) -> float:
        times: list[float] = []
        for _ in range(8):
            at = time.perf_counter()
            work()
            times.append(time.perf_counter() - at)
        return min(times)

    return {"GB/s": data.nbytes / best(data.sum) / 1e9, "GFLOP/s": 2 * 2048**3 / best(lambda: square @ square) / 1e9}


def in_process(engine: str, model: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own; add its peak memory."""
    python = {"llama.cpp": args.llama_python, "vLLM": args.vllm_python}.get(engine, sys.executable)
    command = [python, __file__, "--one", engine, model, "--kind", kind, "--threads", str(args.threads)]
    command += ["--started", str(time.time())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def engines(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Return engine, model and kind of everything to measure."""
    wanted: list[tuple[str, str, str]] = []
    if args.model:
        wanted += [("ours", args.model, kind) for kind in OURS]
    if args.model and importlib.util.find_spec("transformers"):
        wanted += [("transformers", args.model, kind) for kind in ("fp32", "bf16")]
    if args.model and args.vllm_python:
        wanted += [("vLLM", args.model, kind) for kind in ("fp32", "bf16")]
    wanted += [(engine, path, Path(path).stem) for path in args.gguf or () for engine in ("ours", "llama.cpp")]
    return [one for one in wanted if not args.engine or one[0] in args.engine]


def table(lines: Sequence[dict[str, Any]]) -> None:
    """Print medians with ranges, and what of the machine's bandwidth and arithmetic they take."""
    machine = {unit: statistics.median(line[unit] for line in lines if unit in line) for unit in ("GB/s", "GFLOP/s")}
    print(f"read bandwidth {machine['GB/s']:.1f} GB/s, float32 {machine['GFLOP/s']:.0f} GFLOP/s; tokens/s")
    names = [f"prefill {n}" for n in PROMPTS] + [f"decode {n}" for n in ROWS]
    names += ["% of GFLOP/s", "% of GB/s", "load s", "first token s", "peak MB"]
    print("| engine | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    rounds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        if "engine" in line:
            rounds.setdefault((line["engine"], line["kind"]), []).append(line)
    for (engine, kind), found in rounds.items():
        for one in found:
            if "error" not in one:
                one["% of GB/s"] = one["decode 1"] * one["bytes"] / machine["GB/s"] / 1e7
                one["% of GFLOP/s"] = one[f"prefill {PROMPTS[0]}"] * 2 * one["products"] / machine["GFLOP/s"] / 1e7
        cells = [_cell([one[name] for one in found if name in one]) for name in names]
        errors = [str(one["error"]) for one in found if "error" in one]
        print(f"| {engine} {kind} | " + " | ".join(cells) + f" |{' ' + errors[0] if errors else ''}")


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def main() -> None:
    """Measure everything in turns, or be the process of one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="directory of a checkpoint")
    parser.add_argument("--gguf", action="append", help="a GGUF file; may be repeated")
    parser.add_argument("--llama-python", default=sys.executable, help="Python that has llama-cpp-python")
    parser.add_argument("--vllm-python", help="Python that has vLLM's CPU build")
    parser.add_argument("--engine", action="append", choices=list(ENGINES), help="only these; may be repeated")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="append every measurement to this file; the table is of all in it")
    parser.add_argument("--even-if-busy", action="store_true", help="print although the machine is busy")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        _be_one(args)
        return
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > BUSY and not args.even_if_busy:
        sys.exit(
            f"The machine is busy (load {load:.2f} a core): figures would mean nothing. --even-if-busy prints them."
        )
    lines: list[dict[str, Any]] = []
    if args.results and args.results.exists():
        lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    for _ in range(args.rounds):
        for engine, model, kind in (("machine", "", ""), *engines(args)):
            found = in_process(engine, model, kind, args)
            lines.append(found if engine == "machine" else {"engine": engine, "kind": kind, **found})
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    table(lines)


def _be_one(args: argparse.Namespace) -> None:
    global STARTED  # noqa: PLW0603 - when this process was started, by its parent's clock
    STARTED = args.started
    found = {**ENGINES, "machine": measure_machine}[args.one](args.model, args.kind, args.threads)
    found["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
