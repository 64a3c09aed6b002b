"""What `bench` measures: each kernel at the shapes of real models, beside what torch offers for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels import act, gemm, gemv, moe, norm, sample
from trio_llm.kernels.attention import Attention, Problem
from trio_llm.model import counter_rng, ops_torch

Work = Callable[[], object]


@attrs.frozen
class Bench:
    """One measurement.

    Attributes:
        num_bytes, flops: The least that must be moved and computed: what the ceilings are set against.
        make: Builds fresh buffers; returns our call and the peers' by name.
    """

    source: str
    name: str
    num_bytes: int
    flops: int
    make: Callable[[torch.device], tuple[Work, dict[str, Work]]]


def all_benches(*, small: bool) -> Iterator[Bench]:
    """Yield every bench; small ones are for the simulator."""
    yield from _attention(small=small)
    yield from _linear(small=small)
    yield from _elementwise(small=small)
    yield from _rest(small=small)


def _attention(*, small: bool) -> Iterator[Bench]:
    context = 40 if small else 2048
    shapes = {
        "Qwen2.5-0.5B": (64, 2, 7),
        "Qwen3-8B": (128, 8, 4),
    }
    for model, (head_dim, kv_heads, group) in list(shapes.items())[: 1 if small else None]:
        for batch in (1,) if small else (1, 32, 256):
            for int8 in (False, True):
                case = Attention(head_dim, kv_heads, group, ((1, context),) * batch, int8=int8)
                name = f"decode {model} B={batch} {context}{' int8' if int8 else ''}"
                flops = 4 * batch * context * kv_heads * group * head_dim
                yield Bench("paged_attn.cu", name, case.cache_bytes, flops, _attend(case))
        case = Attention(head_dim, kv_heads, group, ((context, context),))
        flops = 2 * context * context * kv_heads * group * head_dim
        yield Bench("paged_attn.cu", f"prefill {model} {context}", case.cache_bytes, flops, _attend(case))


def _attend(case: Attention) -> Callable[[torch.device], tuple[Work, dict[str, Work]]]:
    def make(device: torch.device) -> tuple[Work, dict[str, Work]]:
        problem = case.make(device)
        return problem.run, {} if case.int8 else {"SDPA, keys gathered beforehand": _sdpa(problem)}

    return make


def _sdpa(problem: Problem) -> Work:
    case = problem.case
    tokens = case.sequences[0][0]
    pairs = [problem.gather(row) for row in range(len(case.sequences))]
    k, v = (torch.stack([pair[i] for pair in pairs]).transpose(1, 2) for i in range(2))
    q = problem.q.view(len(pairs), tokens, -1, case.head_dim).transpose(1, 2)
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True)


def _linear(*, small: bool) -> Iterator[Bench]:
    inputs, outputs = (64, 32) if small else (4096, 24576)  # gate and up of Qwen3-8B
    for rows in (1, 4):
        for int8 in (False, True):

            def make(device: torch.device, rows: int = rows, int8: bool = int8) -> tuple[Work, dict[str, Work]]:
                x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
                dense = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
                peers: dict[str, Work] = {"cuBLAS and act": lambda: ops_torch.act_and_mul(F.linear(x, dense), "silu")}
                if not int8:
                    return lambda: gemv.linear(x, dense, activation="silu"), peers
                weight, scale = dense.clamp(-9, 9).mul(14).to(torch.int8), dense.abs().amax(1)
                return lambda: gemv.linear(x, weight, scale=scale, activation="silu"), peers

            name = f"gate and up, {rows} rows{', int8' if int8 else ''}"
            num_bytes = inputs * outputs * (1 if int8 else 2)
            yield Bench("gemv.cu", name, num_bytes, 2 * rows * inputs * outputs, make)
    for rows in (16, 64):

        def make_many(device: torch.device, rows: int = rows) -> tuple[Work, dict[str, Work]]:
            x, dense = (torch.randn(n, inputs, device=device, dtype=torch.bfloat16) for n in (rows, outputs))
            weight, scale = dense.clamp(-9, 9).mul(14).to(torch.int8), dense.abs().amax(1)
            return lambda: gemm.linear(x, weight, scale), {"cuBLAS": lambda: F.linear(x, dense)}

        yield Bench(
            "gemm.cu", f"gate and up, {rows} rows, int8", inputs * outputs, 2 * rows * inputs * outputs, make_many
        )


def _elementwise(*, small: bool) -> Iterator[Bench]:
    hidden = 64 if small else 4096
    for rows in (2,) if small else (256, 8192):

        def make_norm(device: torch.device, rows: int = rows) -> tuple[Work, dict[str, Work]]:
            x, residual, weight = (torch.randn(rows, hidden, device=device).bfloat16() for _ in range(3))
            w = weight[0]
            return lambda: norm.add_rms_norm(x, residual, w, 1e-6), {
                "eager": lambda: ops_torch.add_rms_norm(x, residual, w, 1e-6)
            }

        def make_act(device: torch.device, rows: int = rows) -> tuple[Work, dict[str, Work]]:
            gate_up = torch.randn(rows, 6 * hidden, device=device).bfloat16()
            return lambda: act.act_and_mul(gate_up, "silu"), {"eager": lambda: ops_torch.act_and_mul(gate_up, "silu")}

        yield Bench("norm.cu", f"add and norm, {rows} rows", rows * hidden * 8, 0, make_norm)
        yield Bench("act.cu", f"silu and multiply, {rows} rows", rows * hidden * 18, 0, make_act)


def _rest(*, small: bool) -> Iterator[Bench]:
    rows, vocab = (2, 300) if small else (32, 151_936)

    def make_sample(device: torch.device) -> tuple[Work, dict[str, Work]]:
        logits = torch.randn(rows, vocab, device=device) * 3
        hashes = counter_rng.token_hashes(vocab).to(device)
        keys = torch.ones(rows, 2, dtype=torch.int32, device=device)
        params = torch.tensor([[0.8, 50, 0.95, 0]], device=device).repeat(rows, 1)

        def sort() -> Tensor:
            return logits.sort(dim=-1, descending=True).values.softmax(-1).cumsum(-1)

        return lambda: sample.sample(logits, params, keys, hashes), {"sort, softmax, cumsum": sort}

    yield Bench("sample.cu", f"top_k 50, top_p 0.95, {rows} rows of {vocab}", rows * vocab * 4, 0, make_sample)
    hidden, width, experts = (64, 64, 4) if small else (4096, 14336, 8)
    for tokens in (1,) if small else (1, 32):

        def make_moe(device: torch.device, tokens: int = tokens) -> tuple[Work, dict[str, Work]]:
            x = torch.randn(tokens, hidden, device=device).bfloat16()
            gate_up = torch.randn(experts, 2 * width, hidden, device=device, dtype=torch.bfloat16)
            down = torch.randn(experts, hidden, width, device=device, dtype=torch.bfloat16)
            load = torch.zeros(experts, dtype=torch.int64, device=device)
            weights, ids = torch.rand(tokens, experts, device=device).topk(2)
            # torch's own loop over experts reads counts on the host: no graph can hold it, so it is no peer here.
            return lambda: moe.moe(x, weights, ids, gate_up, down, load, "silu"), {}

        used = min(experts, 2 * tokens)
        flops, num_bytes = 2 * tokens * 2 * 3 * hidden * width, used * 3 * hidden * width * 2
        yield Bench("moe.cu", f"Mixtral layer, {tokens} tokens", num_bytes, flops, make_moe)
