"""What `bench` measures: each kernel at the shapes of real models, what it must reach, and its peers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import attrs
import torch
from torch import Tensor

from cuda_kernels import act, gemv, kv_write, moe, norm, sample
from tools.kernel_lab import peers
from tools.kernel_lab.attention import Case, make
from tools.kernel_lab.device import Call
from tools.kernel_lab.shapes import MODELS, SMALL
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.ops.matrices import Blocks, Dense, Int8, Tiles
from trio_llm.model.paged.attention_batch import AttentionBatch
from trio_llm.model.paged.kv_cache import AttentionSpec, plan_kv
from trio_llm.model.paged.rope import Rope
from trio_llm.model.sampling import counter_rng

EPS = 1e-6
GRAPH_BOUND = 32768  # tokens
SOURCES_BY_ROWS = ((gemv.MAX_ROWS, "gemv.cu"), (64, "gemm.cu"))  # of int8 weights; beyond, gemm_s8.cu


@attrs.frozen
class Target:
    """What a measurement must reach: `first` before the kernel may be the fast path, `good` is the aim.

    Attributes:
        unit: "of floor", "times" (as fast as the bench or peer of `versus`) and "TFLOP/s" want to be large, "us" small.
    """

    unit: Literal["of floor", "times", "TFLOP/s", "us"]
    first: float
    good: float
    versus: str | None = None

    def reached(self, value: float) -> str:
        """Return "good", "first" or "no"; "-" where nothing was measured."""
        if math.isnan(value):
            return "-"
        for name, wanted in (("good", self.good), ("first", self.first)):
            if value <= wanted if self.unit == "us" else value >= wanted:
                return name
        return "no"


@attrs.frozen
class Bench:
    """One measurement.

    Attributes:
        num_bytes, flops: The least that must be moved and computed: what the ceilings are set against.
        writes: Whether as much is written as read, so that copying is the ceiling and not reading.
        make: Builds fresh buffers; returns our call and the makers of the peers'.
    """

    source: str
    name: str
    num_bytes: int
    flops: int
    target: Target | None
    make: Callable[[torch.device], tuple[Call, Mapping[str, peers.Maker]]]
    writes: bool = False

    def floor_us(self, ceilings: Mapping[str, float]) -> float:
        """Return how long this takes at the machine's ceilings."""
        bandwidth = ceilings["copy_gb_s" if self.writes else "read_gb_s"]
        return max(self.num_bytes / bandwidth / 1e3, self.flops / ceilings["bf16_tflop_s"] / 1e6)


def all_benches(*, small: bool) -> Iterator[Bench]:
    """Yield every bench, the most wanted first; small ones are for the simulator."""
    yield from _decode(small=small)
    yield from _prefill(small=small)
    yield from _linear(small=small)
    yield from _linear_w4(small=small)
    yield from _elementwise(small=small)
    yield from _experts(small=small)
    for rows in (2,) if small else (1, 32):
        yield _sample(rows, 300 if small else 151_936)
    yield _step(small=small)


def _decode(*, small: bool) -> Iterator[Bench]:
    """Decodes as a step launches them, and with the grid of a graph, which is for the longest possible context."""
    of_floor, few = Target("of floor", 0.65, 0.82), Target("us", 15, 9)
    shapes = ((1, 2048, few), (32, 2048, of_floor), (256, 2048, of_floor), (1, 32768, Target("of floor", 0.55, 0.7)))
    if small:
        shapes = ((1, 40, few), (2, 24, of_floor))
    for batch, context, target in shapes:
        for model, shape in (SMALL if small else MODELS).items():
            name = f"decode {model} B={batch} {context}"
            case = Case(shape.head_dim, shape.kv_heads, shape.group, ((1, context),) * batch)
            yield _attention(name, case, target)
            if context < GRAPH_BOUND and not small:
                yield _attention(f"{name} in a graph", replace(case, bound=GRAPH_BOUND), target)
            yield _attention(f"{name} int8", replace(case, int8=True), Target("times", 1.3, 1.6, versus=name))
            fp8 = replace(case, int8=True, fp8=True)
            yield _attention(f"{name} fp8", fp8, Target("times", 1.2, 1.5, versus=name))


def _prefill(*, small: bool) -> Iterator[Bench]:
    for context in (24,) if small else (2048, 512, 8192):
        for model, shape in (SMALL if small else MODELS).items():
            case = Case(shape.head_dim, shape.kv_heads, shape.group, ((context, context),))
            target = Target("TFLOP/s", 230, 330) if shape.head_dim == 128 and context >= 2048 else None
            yield _attention(f"prefill {model} {context}", case, target)


def _attention(name: str, case: Case, target: Target | None) -> Bench:
    """Count what every query sees, so that of a prefill half of the square."""
    seen = sum(tokens * (2 * length - tokens + 1) / 2 for tokens, length in case.sequences)
    flops = round(4 * seen * case.kv_heads * case.group * case.head_dim)
    return Bench("paged_attn.cu", name, case.cache_bytes, flops, target, partial(_attend, case))


def _attend(case: Case, device: torch.device) -> tuple[Call, Mapping[str, peers.Maker]]:
    problem = make(case, device)
    return problem.run, peers.attention(problem)


def _linear(*, small: bool) -> Iterator[Bench]:
    """Every linear layer, as the engine runs it: 16-bit ones of more rows than a GEMV takes are cuBLAS's alone."""
    for rows in (1, 16, 72) if small else (1, 8, 16, 64, 4, 128, 2048):
        for model, shape in (SMALL if small else MODELS).items():
            for name, inputs, outputs, gated in shape.linears():
                for int8 in (False, True) if rows <= gemv.MAX_ROWS else (True,):
                    label = f"{name} of {model}, {rows} rows{', int8' if int8 else ''}"
                    num_bytes = inputs * outputs * (1 if int8 else 2)
                    source = next((name for most, name in SOURCES_BY_ROWS if rows <= most), "gemm_s8.cu")
                    target = Target("of floor", 0.55, 0.7) if int8 else Target("of floor", 0.75, 0.85)
                    if source != "gemv.cu":
                        target = Target("times", 1, 1.1, versus="cuBLAS")
                    build = partial(_product, rows, inputs, outputs, int8, gated)
                    yield Bench(source, label, num_bytes, 2 * rows * inputs * outputs, target, build)


def _product(
    rows: int, inputs: int, outputs: int, int8: bool, gated: bool, device: torch.device
) -> tuple[Call, Mapping[str, peers.Maker]]:
    x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    dense = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    matrix: Dense | Int8 = Dense(dense)
    quantised = None
    if int8:
        scale = dense.abs().amax(1) / 127
        weight = (dense / scale[:, None]).round().to(torch.int8)
        quantised, matrix, dense = (weight, scale), Int8(weight, scale), weight.to(x.dtype) * scale[:, None]
    if gated:
        return lambda: ops_cuda.gated_linear(x, matrix, "silu"), peers.gated_linear(x, dense, quantised)
    return lambda: ops_cuda.linear(x, matrix), peers.linear(x, dense, quantised)


def _linear_w4(*, small: bool) -> Iterator[Bench]:
    """The layers of 4-bit weights, groups of 128 with zero points as AWQ and GPTQ store them."""
    group = 32 if small else 128
    for rows in (1, 16) if small else (1, 16, 64, 8):
        for model, shape in (SMALL if small else MODELS).items():
            for name, inputs, outputs, gated in shape.linears():
                if outputs % 32 or inputs % group:
                    continue
                num_bytes = inputs * outputs // 2 + inputs // group * outputs * 3
                build = partial(_product_w4, rows, inputs, outputs, group, gated)
                label, flops = f"{name} of {model}, {rows} rows, 4 bits", 2 * rows * inputs * outputs
                yield Bench("gemm_w4.cu", label, num_bytes, flops, Target("of floor", 0.5, 0.65), build)


def _product_w4(
    rows: int, inputs: int, outputs: int, group: int, gated: bool, device: torch.device
) -> tuple[Call, Mapping[str, peers.Maker]]:
    x, groups = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16), (outputs, inputs // group)
    numbers = torch.randint(256, (outputs, inputs // 2), device=device, dtype=torch.uint8)
    zero = torch.randint(16, groups, device=device, dtype=torch.int8)
    matrix = Blocks(numbers, (torch.rand(groups, device=device) / 64).half(), zero=zero)
    dense, tiles = ops_torch.dequantize(matrix).to(x.dtype), Tiles.of(matrix)
    if gated:
        return lambda: ops_cuda.gated_linear(x, tiles, "silu"), peers.gated_linear(x, dense, None)
    return lambda: ops_cuda.linear(x, tiles), peers.linear(x, dense, None)


def _elementwise(*, small: bool) -> Iterator[Bench]:
    hidden = 64 if small else 4096
    for rows in (2,) if small else (1, 256, 8192):
        target = Target("of floor", 0.75, 0.88) if rows > 2048 else Target("us", 3, 2.2)
        for source, name, num_bytes, maker in (
            ("norm.cu", "add and norm", rows * hidden * 8, _norm),
            ("act.cu", "silu and multiply", rows * hidden * 18, _act),
            ("kv_write.cu", "norm, rotate and write keys and values", rows * hidden * 6, _write),
        ):
            build = partial(maker, rows, hidden)
            yield Bench(source, f"{name}, {rows} rows of Qwen3-8B", num_bytes, 0, target, build, writes=True)


def _norm(rows: int, hidden: int, device: torch.device) -> tuple[Call, Mapping[str, peers.Maker]]:
    x, residual, weight = (torch.randn(rows, hidden, device=device).bfloat16() for _ in range(3))
    args = (x, residual, weight[0], EPS)
    return lambda: norm.add_rms_norm(*args), peers.elementwise(ops_torch.add_rms_norm, *args)


def _act(rows: int, hidden: int, device: torch.device) -> tuple[Call, Mapping[str, peers.Maker]]:
    gate_up = torch.randn(rows, 6 * hidden, device=device).bfloat16()
    return lambda: act.act_and_mul(gate_up, "silu"), peers.elementwise(ops_torch.act_and_mul, gate_up, "silu")


def _write(rows: int, hidden: int, device: torch.device) -> tuple[Call, Mapping[str, peers.Maker]]:
    """Take as many query heads as fill `hidden`, and a fourth of it each of keys and of values."""
    head_dim = 128 if hidden > 1024 else 64
    heads, kv_heads = hidden // head_dim, max(1, hidden // head_dim // 4)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device=device).bfloat16()
    angles = torch.randn(rows, head_dim // 2, device=device)
    cos, sin, slots = angles.cos(), angles.sin(), torch.randperm(rows, device=device)
    pools = [torch.zeros(rows, kv_heads, head_dim, device=device, dtype=qkv.dtype) for _ in range(4)]
    weight = torch.rand(heads + kv_heads, head_dim, device=device)

    def ours() -> Tensor:
        options = {"num_heads": heads, "qk_norm": weight, "v_norm": False, "eps": EPS}
        return kv_write.write_kv(qkv, cos, sin, slots, *pools[:2], None, None, **options)  # type: ignore[arg-type]

    return ours, peers.elementwise(_write_in_torch, qkv, cos, sin, slots, *pools[2:], weight)


def _write_in_torch(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_pool: Tensor, v_pool: Tensor, weight: Tensor
) -> Tensor:
    kv_heads, head_dim = k_pool.shape[1:]
    q_and_k, v = qkv.view(len(qkv), -1, head_dim).split((len(weight), kv_heads), dim=1)
    first, second = (ops_torch.rms_norm(q_and_k.float(), None, EPS) * weight).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    k_pool[slots] = turned[:, -kv_heads:]
    v_pool[slots] = v
    return turned[:, :-kv_heads]


def _experts(*, small: bool) -> Iterator[Bench]:
    hidden, width, experts = (64, 64, 4) if small else (4096, 14336, 8)
    for tokens in (1, 2) if small else (1, 32):
        used = min(experts, 2 * tokens)  # this many tokens use all experts, with two each
        flops, num_bytes = 2 * tokens * 2 * 3 * hidden * width, used * 3 * hidden * width * 2
        build = partial(_moe, tokens, hidden, width, experts)
        yield Bench("moe.cu", f"Mixtral layer, {tokens} tokens", num_bytes, flops, Target("of floor", 0.6, 0.78), build)


def _moe(
    tokens: int, hidden: int, width: int, experts: int, device: torch.device
) -> tuple[Call, Mapping[str, peers.Maker]]:
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    gate_up = torch.randn(experts, 2 * width, hidden, device=device, dtype=torch.bfloat16) / hidden**0.5
    down = torch.randn(experts, hidden, width, device=device, dtype=torch.bfloat16) / width**0.5
    load = torch.zeros(experts, dtype=torch.int64, device=device)
    chosen = (torch.arange(tokens * 2, device=device) % experts).view(tokens, 2)
    weights = torch.rand(tokens, 2, device=device)
    ours = lambda: moe.moe(x, weights, chosen, gate_up, down, load, "silu")  # noqa: E731 - a call
    return ours, peers.experts(x, weights, chosen, gate_up, down)


def _sample(rows: int, vocab: int) -> Bench:
    def build(device: torch.device) -> tuple[Call, Mapping[str, peers.Maker]]:
        logits = torch.randn(rows, vocab, device=device) * 3
        hashes = counter_rng.token_hashes(vocab).to(device)
        keys = torch.ones(rows, 2, dtype=torch.int32, device=device)
        params = torch.tensor([[0.8, 50, 0.95, 0]], device=device).repeat(rows, 1)
        return lambda: sample.sample(logits, params, keys, hashes), peers.sampling(logits / 0.8, 50, 0.95)

    name = f"top_k 50, top_p 0.95, {rows} rows of {vocab}"
    target = Target("us", 25, 12) if rows == 1 else Target("us", 60, 30)
    return Bench("sample.cu", name, rows * vocab * 4, 0, target, build)


def _step(*, small: bool) -> Bench:
    rows, context, size = (2, 40, 4) if small else (256, 2048, 16)

    def build(device: torch.device) -> tuple[Call, Mapping[str, peers.Maker]]:
        spec = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, scale=1.0, kv_layer=0)
        layout = plan_kv([spec], block_size=size, dtype=torch.bfloat16)
        tables = [torch.randint(99, (rows + 1, context // size), dtype=torch.int32, device=device)]
        positions = torch.randint(context, (rows,), device=device)
        inputs = torch.stack([torch.arange(rows, device=device), torch.zeros_like(positions), positions])
        rope = Rope(torch.rand(spec.head_dim // 2, device=device), 1.0)

        def prepared(prepare: Callable[..., AttentionBatch]) -> Tensor:
            batch = prepare(inputs, tables, rows, layout, [rope], context)
            return batch.memo(rope, lambda: ops_torch.rope_angles(batch, rope))[0]

        peer = partial(prepared, ops_torch.prepare_decodes)
        return partial(prepared, ops_cuda.prepare_decodes), {"torch's operations": lambda: peer}

    name = f"tables, slots and angles of {rows} rows with {context} tokens"
    return Bench("step.cu", name, rows * context // size * 8, 0, Target("us", 6, 3), build)
