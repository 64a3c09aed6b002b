"""What `check` runs: every kernel on random data, compared with float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Generator, Iterator
from itertools import product
from typing import Any

import attrs
import torch
from torch import Tensor

from cuda_kernels import act, gemm, gemm_s8, gemm_w4, gemv, kv_write, moe, norm, quant, sample, step
from cuda_kernels.paged_attn import HEAD_DIMS
from tools.kernel_lab.attention import CASES, LARGE, MATRIX, make
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.ops.matrices import Blocks, Dense, Experts, Tiles
from trio_llm.model.sampling import counter_rng

EPS = 1e-6
LARGER = 16  # times the sizes of what is simulated, on a GPU
# Largest error allowed, as a part of the largest value: twice the rounding of the stored type, and room for sums.
TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-4}


Results = Callable[[], tuple[Tensor, ...]]


@attrs.frozen
class Check:
    """One comparison.

    Attributes:
        source: The kernel's file.
        run: Runs the kernel; its results.
        expect: The same, in float64 or integers.
        computed_in: A type coarser than the results', where the kernel goes through one.
    """

    source: str
    name: str
    run: Results
    expect: Results
    computed_in: torch.dtype | None = None


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a part of the largest expected value; integers must be equal."""
    if not actual.is_floating_point():
        return 0.0 if torch.equal(actual, expected.to(actual.dtype)) else float("inf")
    difference = (actual.double() - expected.double()).abs().amax() / expected.double().abs().amax().clamp_min(1e-30)
    return float(difference.nan_to_num(nan=torch.inf))


@contextlib.contextmanager
def poisoned() -> Generator[None]:
    """Fill fresh tensors with NaN (the largest number, for integers): what a kernel forgets to write shows."""
    # Fills torch.empty as a part of what it does. use_deterministic_algorithms does too, and imports torch's compiler.
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


def compare(check: Check) -> dict[str, float]:
    """Run a check; returns its error and the limit.

    Raises:
        ArithmeticError: The error is over the limit.
    """
    with poisoned():
        return judge(check, check.run())


def judge(check: Check, results: tuple[Tensor, ...]) -> dict[str, float]:
    """Compare a check's results with what they should be; returns and raises what `compare` does."""
    pairs = list(zip(results, check.expect(), strict=True))
    worst = max(error(actual, expected) for actual, expected in pairs)
    limit = max(TOLERANCE.get(check.computed_in or actual.dtype, 0.0) for actual, _ in pairs)
    if not worst <= limit:
        raise ArithmeticError(f"{check.source}, {check.name}: error {worst:.2e}, allowed {limit:.2e}")
    return {"error": worst, "limit": limit}


def assert_same_bits(check: Check, first: tuple[Tensor, ...], second: tuple[Tensor, ...], what: str) -> None:
    """Raise ArithmeticError where two results of a check differ in a bit."""
    for one, other in zip(first, second, strict=True):
        if not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            raise ArithmeticError(f"{check.source}, {check.name}: {what}")


def all_checks(device: torch.device, *, small: bool, sources: Container[str] | None = None) -> Iterator[Check]:
    """Yield every check, or those of some sources, in the order of MAKERS; small ones can be simulated."""
    for source, make_checks in MAKERS.items():
        if sources is None or source in sources:
            torch.manual_seed(0)
            yield from make_checks(device, 1 if small else LARGER)


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(device, dtype)


def _both_types(
    make_checks: Callable[[torch.device, torch.dtype, int], Iterator[Check]],
) -> Callable[[torch.device, int], Iterator[Check]]:
    def of_both(device: torch.device, scale: int) -> Iterator[Check]:
        for dtype in (torch.bfloat16, torch.float16):
            yield from make_checks(device, dtype, scale)

    return of_both


def _attention(device: torch.device, scale: int) -> Iterator[Check]:
    for case in CASES if scale == 1 else (*CASES, *MATRIX, *LARGE):
        problem = make(case, device)
        # Beside int8 values, probabilities are bfloat16.
        coarse = torch.bfloat16 if case.int8 else None
        run, expect = (lambda p=problem: (p.run(),)), (lambda p=problem: (p.expect(),))
        yield Check("paged_attn.cu", str(case), run, expect, coarse)


def _norm(device: torch.device, dtype: torch.dtype, scale: int) -> Iterator[Check]:
    hidden, rows = 64 * scale, 4 * scale
    x, residual, weight = (_random(device, dtype, rows, hidden) for _ in range(3))
    w = weight[0]
    yield Check("norm.cu", f"rms_norm {dtype}", lambda: (norm.rms_norm(x, w, EPS),),
                lambda: (ops_torch.rms_norm(x.double(), w.double(), EPS),))  # fmt: skip
    total = x + residual
    yield Check("norm.cu", f"add_rms_norm {dtype}", lambda: norm.add_rms_norm(x, residual, w, EPS),
                lambda: (ops_torch.rms_norm(total.double(), w.double(), EPS), total.double()))  # fmt: skip


def _act(device: torch.device, dtype: torch.dtype, scale: int) -> Iterator[Check]:
    gate_up = _random(device, dtype, 4 * scale, 128 * scale)
    for kind in ("silu", "gelu_tanh"):
        yield Check("act.cu", f"{kind} {dtype}", lambda k=kind: (act.act_and_mul(gate_up, k),),
                    lambda k=kind: (ops_torch.act_and_mul(gate_up.double(), k),))  # fmt: skip


def _quant(device: torch.device, dtype: torch.dtype, scale: int) -> Iterator[Check]:
    x = _random(device, dtype, 4 * scale, 64 * scale)

    def quantised(into: Callable[[Tensor, Tensor, Tensor], None]) -> tuple[Tensor, Tensor]:
        q, scales = (
            torch.zeros(x.shape, dtype=torch.int8, device=device),
            torch.zeros(len(x), dtype=dtype, device=device),
        )
        into(x, q, scales)
        return q, scales

    yield Check("quant.cu", f"quantize_rows {dtype}", lambda: quantised(quant.quantize_rows),
                lambda: quantised(ops_torch.quantize_rows))  # fmt: skip
    yield Check("quant.cu", f"quantize_tokens {dtype}", lambda: quant.quantize_tokens(x), lambda: round_tokens(x))


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `quant.quantize_tokens` must, bit for bit."""
    scale = (x.float().abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (x.float() * (1 / scale)[:, None]).round().to(torch.int8), scale


def _gemv(device: torch.device, dtype: torch.dtype, scale: int) -> Iterator[Check]:
    """Every specialisation on a GPU; two of them simulated."""
    dense, q, scales = _weights(device, dtype, 64 * scale, 32 * scale)
    every = [(rows, int8, gated) for rows in (1, 2, 4, 8) for int8 in (False, True) for gated in (False, True)]
    for rows, int8, gated in every if scale > 1 else ((3, False, False), (3, True, True)):
        x, kind = _random(device, dtype, rows, 64 * scale), "silu" if gated else None
        weight, own = (q, scales) if int8 else (dense, None)

        def run(x: Tensor = x, weight: Tensor = weight, own: Tensor | None = own, kind: Any = kind) -> tuple[Tensor]:
            return (gemv.linear(x, weight, scale=own, activation=kind),)

        def expect(
            x: Tensor = x, weight: Tensor = weight, own: Tensor | None = own, gated: bool = gated
        ) -> tuple[Tensor]:
            product = x.double() @ weight.double().T * (1 if own is None else own.double())
            return (ops_torch.act_and_mul(product, "silu") if gated else product,)

        name = f"{rows} rows, {'int8' if int8 else '16-bit'}{', gated' if gated else ''} {dtype}"
        yield Check("gemv.cu", name, run, expect)


def _gemm(device: torch.device, dtype: torch.dtype, scale: int) -> Iterator[Check]:
    _, q, scales = _weights(device, dtype, 64 * scale, 32 * scale)
    for rows in (20,) if scale == 1 else (9, 20, 64):
        x = _random(device, dtype, rows, 64 * scale)
        yield Check("gemm.cu", f"{rows} rows {dtype}", lambda x=x: (gemm.linear(x, q, scales),),
                    lambda x=x: (x.double() @ q.double().T * scales.double(),))  # fmt: skip


def _gemm_s8(device: torch.device, dtype: torch.dtype, scale: int) -> Iterator[Check]:
    """More rows than a tile, and few enough blocks that they share the inputs."""
    _, q, scales = _weights(device, dtype, 64 * scale, 32 * scale)
    for rows in (70,) if scale == 1 else (70, 300, 3000):
        x = round_tokens(_random(device, dtype, rows, 64 * scale))
        yield Check("gemm_s8.cu", f"{rows} rows {dtype}", lambda x=x: (gemm_s8.linear(*x, q, scales),),
                    lambda x=x: ((x[0] * x[1].double()[:, None]) @ q.double().T * scales.double(),))  # fmt: skip


def _gemm_w4(device: torch.device, dtype: torch.dtype, scale: int) -> Iterator[Check]:
    """Zero points and float16 scales, then minima and float32 ones; each tile of rows on a GPU."""
    groups, kinds = (64 * scale, 4), (("zero", torch.float16), ("minimum", torch.float32))
    for rows, (offset, kept) in product((20,) if scale == 1 else (1, 16, 20, 64, 100), kinds):
        x, numbers = _random(device, dtype, rows, 128 * scale), torch.randint(0, 256, (64 * scale, 64 * scale))
        offsets = torch.randint(0, 16, groups, dtype=torch.int8) if offset == "zero" else torch.randn(groups).to(kept)
        scales = (torch.rand(groups) / 10).to(kept)
        matrix = Blocks(numbers.to(torch.uint8), scales, **{offset: offsets}).to(device)  # type: ignore[arg-type]
        tiles = Tiles.of(matrix)

        def run(x: Tensor = x, tiles: Tiles = tiles) -> tuple[Tensor]:
            return (gemm_w4.linear(x, tiles.weight, tiles.scale, zeros=tiles.zero, minima=tiles.minimum),)

        def expect(x: Tensor = x, matrix: Blocks = matrix) -> tuple[Tensor]:
            return (x.double() @ ops_torch.dequantize(matrix).double().T,)

        yield Check("gemm_w4.cu", f"{rows} rows, {offset} {dtype}", run, expect)


def _weights(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights [N, K], int8 ones, and the scales of those [N]."""
    q = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8).to(device)
    return _random(device, dtype, outputs, inputs), q, (torch.rand(outputs) / 100).to(device, dtype)


def _experts(device: torch.device, dtype: torch.dtype, scale: int) -> Iterator[Check]:
    hidden, width, experts, tokens = 64 * scale, 64 * scale, 4, 5 * scale
    x = _random(device, dtype, tokens, hidden)
    gate_up = _random(device, dtype, experts, 2 * width, hidden) / 8
    down = _random(device, dtype, experts, hidden, width) / 8
    logits = _random(device, dtype, tokens, experts)
    chosen = ops_torch.route(logits.float(), 2)

    def expect() -> tuple[Tensor, Tensor]:
        load = torch.zeros(experts, dtype=torch.int64, device=device)
        wide = Experts(Dense(gate_up.double()), Dense(down.double()), load)
        return ops_torch.moe(x.double(), chosen[0].double(), chosen[1], wide, "silu"), load

    def run() -> tuple[Tensor, Tensor]:
        load = torch.zeros(experts, dtype=torch.int64, device=device)
        return moe.moe(x, *chosen, gate_up, down, load, "silu"), load

    yield Check("moe.cu", f"experts {dtype}", run, expect)
    yield Check("moe.cu", f"route {dtype}", lambda: (moe.route(logits, 2)[0],), lambda: (chosen[0].double(),))


def _step(device: torch.device, scale: int) -> Iterator[Check]:
    """Two KV groups and one rope, a row of padding, angles of up to a hundred thousand."""
    count, known = 3 * scale, 8 * scale
    rows = torch.randperm(known)[:count].to(device)
    positions = torch.randint(0, 60 * scale, (count,)).to(device)
    groups = [(torch.randint(0, 999, (known, 70 * scale), dtype=torch.int32).to(device), 60 * scale, 1) for _ in "ab"]
    groups[1] = (groups[1][0], 4 * scale, 16)
    frequencies = (torch.logspace(0, 3.2, 16) * 100).to(device)

    def run() -> tuple[Tensor, ...]:
        done = step.prepare(rows, positions, groups, [(frequencies, 0.5)], int(rows[1]))
        return *done.tables, *done.slots, *done.angles[0], done.context, done.cu_q, done.padding

    def expect() -> tuple[Tensor, ...]:
        own = [table[rows, :width] for table, width, _ in groups]
        slots = [
            table.gather(1, (positions // size)[:, None])[:, 0].long() * size + positions % size
            for table, (_, _, size) in zip(own, groups, strict=True)
        ]
        angles = (positions[:, None].float() * frequencies).double()
        numbers = torch.arange(count + 1, device=device)
        return *own, *slots, angles.cos() / 2, angles.sin() / 2, positions + 1, numbers, rows == rows[1]

    yield Check("step.cu", "tables, slots and angles", run, expect)


def _kv_write(device: torch.device, scale: int) -> Iterator[Check]:
    for head_dim in HEAD_DIMS:
        tokens, dtype = 2 * scale, torch.bfloat16
        qkv, angles = _random(device, dtype, tokens, 4 * head_dim), torch.randn(tokens, head_dim // 2).to(device)
        slots = torch.randperm(tokens).to(device)

        def run(qkv: Tensor = qkv, angles: Tensor = angles, slots: Tensor = slots) -> tuple[Tensor, ...]:
            k, v = torch.zeros(2, len(slots), 1, qkv.shape[1] // 4, dtype=qkv.dtype, device=qkv.device)
            cos, sin = angles.cos(), angles.sin()
            args = (qkv, cos, sin, slots, k, v, None, None)
            q = kv_write.write_kv(*args, num_heads=2, qk_norm=None, v_norm=True, eps=EPS)
            return q, k[slots], v[slots]

        def expect(qkv: Tensor = qkv, angles: Tensor = angles) -> tuple[Tensor, ...]:
            heads = qkv.double().view(len(qkv), 4, -1)
            turned = _rotated(heads[:, :3], angles)
            return turned[:, :2], turned[:, 2:], ops_torch.rms_norm(heads[:, 3:], None, EPS)

        yield Check("kv_write.cu", f"head size {head_dim}", run, expect)

    yield Check("kv_write.cu", "int8, normalised, padded", *_quantised_write(device, scale))


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate x [S, heads, D] by angles [S, D / 2], in float64."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _quantised_write(device: torch.device, scale: int) -> tuple[Results, Results]:
    """Return our write of int8 keys and values, and what it should be; every third row is padding."""
    tokens, head_dim = 3 * scale, 128
    qkv, angles = _random(device, torch.bfloat16, tokens, 4 * head_dim), torch.randn(tokens, head_dim // 2).to(device)
    weight = torch.rand(3, head_dim).to(device) + 0.5
    slots = torch.randperm(tokens).to(device)
    written = torch.arange(tokens, device=device) % 3 < 2
    slots, kept = slots.where(written, -1), slots[written]

    def run() -> tuple[Tensor, ...]:
        k, v = torch.zeros(2, tokens, 1, head_dim, dtype=torch.int8, device=device)
        k_scale, v_scale = torch.zeros(2, tokens, 1, device=device)
        args = (qkv, angles.cos(), angles.sin(), slots, k, v, k_scale, v_scale)
        q = kv_write.write_kv(*args, num_heads=2, qk_norm=weight, v_norm=False, eps=EPS)
        return q, *((x * s[..., None]).to(q.dtype)[kept] for x, s in ((k, k_scale), (v, v_scale)))

    def expect() -> tuple[Tensor, ...]:
        heads = qkv.double().view(tokens, 4, head_dim)
        turned = _rotated(ops_torch.rms_norm(heads[:, :3], None, EPS) * weight.double(), angles)
        return turned[:, :2], turned[written, 2:], heads[written, 3:]

    return run, expect


def _sample(device: torch.device, scale: int) -> Iterator[Check]:
    """Of a real vocabulary on a GPU, where many blocks share a row."""
    vocab = 500 if scale == 1 else 151_936
    logits = torch.randn(5, vocab).to(device) * 3
    hashes = counter_rng.token_hashes(vocab).to(device)
    keys = torch.tensor([[11, 7], [-5, 9], [3, 1], [8, 5], [-2, 3]], dtype=torch.int32, device=device)
    filters = [(0, vocab, torch.inf), (1, vocab, torch.inf), (0.7, 1, 1), (0.7, 40, 0.9), (2, vocab, 0.8)]
    params = torch.tensor([(*one, 0) for one in filters], device=device)

    def expect() -> tuple[Tensor, ...]:
        ids = logits.argmax(-1)
        for row, (temperature, top_k, top_p) in enumerate(filters[1:], 1):
            scores = (logits[row].double() - logits[row].amax()) / temperature
            ordered = scores.sort(descending=True).values[:top_k]
            mass = ordered.exp()
            kept = scores >= ordered[mass.cumsum(0) - mass < top_p * mass.sum()][-1]
            noisy = counter_rng.add_gumbel(scores.where(kept, -torch.inf)[None].float(), keys[row : row + 1], hashes)
            ids[row] = noisy.argmax()
        return (ids,)

    chosen = torch.tensor([0, 9, vocab // 2, vocab - 2, vocab - 1], device=device)

    def logprobs() -> tuple[Tensor, Tensor]:
        own = logits.gather(1, chosen[:, None])
        return logits.double().log_softmax(-1).gather(1, chosen[:, None])[:, 0], (logits > own).sum(1) + 1

    yield Check("sample.cu", "greedy, plain, filtered", lambda: (sample.sample(logits, params, keys, hashes),), expect)
    yield Check("sample.cu", "log-probabilities and ranks", lambda: sample.token_logprobs(logits, chosen), logprobs)


# In the order of a first contact with a GPU: attention is the largest kernel, and what most depends on it.
MAKERS: dict[str, Callable[[torch.device, int], Iterator[Check]]] = {
    "paged_attn.cu": _attention,
    "gemv.cu": _both_types(_gemv),
    "norm.cu": _both_types(_norm),
    "step.cu": _step,
    "kv_write.cu": _kv_write,
    "act.cu": _both_types(_act),
    "sample.cu": _sample,
    "gemm.cu": _both_types(_gemm),
    "gemm_s8.cu": _both_types(_gemm_s8),
    "gemm_w4.cu": _both_types(_gemm_w4),
    "moe.cu": _both_types(_experts),
    "quant.cu": _both_types(_quant),
}
