"""What torch offers for the same work, to compare our kernels with.

Each maker returns a call that gives what ours gives (or None, where it gives something else). A maker or a call that
fails says with its exception that this peer is not to be had here; that is written down and nothing stops.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Generator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.kernel_lab.attention import Problem
from tools.kernel_lab.device import Call
from trio_llm.model.ops import long_prefills
from trio_llm.model.ops import torch_reference as ops_torch

Maker = Callable[[], Call]


class Once:
    """A maker too slow to be asked for many buffers: its call is timed over one, which may then lie in the cache."""

    def __init__(self, maker: Maker) -> None:
        self._maker = maker

    def __call__(self) -> Call:
        return self._maker()


FLEX_BLOCK = 128
VARLEN_PAGE = 256  # what FlashAttention 2's paged cache needs


@functools.cache
def compiled(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Compile as one does for speed; on a CPU only trace, which needs no C++ compiler."""
    return torch.compile(function, backend="inductor" if device.type == "cuda" else "eager", dynamic=False)


def attention(problem: Problem) -> dict[str, Maker]:
    """Return every way that torch has to attend; those of dense keys get them gathered, which is timed apart."""
    makers: dict[str, Maker] = {
        "SDPA flash, gathered": lambda: _sdpa(problem, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN, gathered": lambda: _sdpa(problem, SDPBackend.CUDNN_ATTENTION),
        "the gather alone": lambda: _gather(problem),
    }
    if not problem.case.int8:
        makers["flex_attention, paged"] = Once(lambda: _flex(problem))
        makers["varlen_attn, paged"] = lambda: _varlen(problem)
        if problem.case.sequences[0][0] > 1:
            makers["flash with its gather, as long prefills"] = lambda: _long_prefill(problem)
    return makers


def _dense(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return keys and values [B, Hkv, X, D] of sequences of one length."""
    pairs = [problem.gather(row, problem.case.dtype) for row in range(len(problem.case.sequences))]
    k, v = (torch.stack([pair[i] for pair in pairs]).transpose(1, 2) for i in range(2))
    return k, v


def _queries(problem: Problem) -> Tensor:
    """Return queries [B, Hq, T, D] of sequences of one length."""
    case = problem.case
    return problem.q.view(len(case.sequences), case.sequences[0][0], -1, case.head_dim).transpose(1, 2)


def _flat(out: Tensor) -> Tensor:
    """Return [B, Hq, T, D] as the kernel lays it out: [S, Hq, D]."""
    return out.transpose(1, 2).flatten(0, 1)


def _sdpa(problem: Problem, backend: SDPBackend) -> Call:
    k, v = _dense(problem)
    q, tokens = _queries(problem), problem.case.sequences[0][0]

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return _flat(F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True))

    return call


def _gather(problem: Problem) -> Call:
    slots = torch.cat([problem.slots(row) for row in range(len(problem.case.sequences))])
    dtype = problem.case.dtype

    def call() -> None:
        k, v = problem.k[slots], problem.v[slots]
        if problem.k_scale is not None and problem.v_scale is not None:
            k = k.to(dtype) * problem.k_scale[slots][..., None].to(dtype)
            v = v.to(dtype) * problem.v_scale[slots][..., None].to(dtype)

    return call


def _long_prefill(problem: Problem) -> Call:
    """Do what the engine does with a long prefill where that is faster: of one sequence."""
    case, ((_, context),) = problem.case, problem.case.sequences
    blocks, scale = problem.tables[0, : -(-context // case.block_size)], case.head_dim**-0.5
    return lambda: long_prefills.attend(problem.q, problem.k, problem.v, blocks, context, case.block_size, scale)


def _flex(problem: Problem) -> Call:
    """Attend over flex_attention's own paged cache, its pages as large as its blocks."""
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, device = problem.case, problem.q.device
    tokens, length = case.sequences[0]
    rows, k, v = len(case.sequences), *_dense(problem)
    pages = rows * -(-length // FLEX_BLOCK)
    paged = PagedAttention(pages, FLEX_BLOCK, rows, device=str(device))
    pools = [k.new_zeros(1, case.kv_heads, pages * FLEX_BLOCK, case.head_dim) for _ in range(2)]
    for row in range(rows):
        paged.reserve(torch.tensor([row], device=device), torch.tensor(length, device=device))
    positions = torch.arange(length, device=device).expand(rows, -1)
    paged.assign(torch.arange(rows, device=device), positions, k, v, *pools)

    def causal(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + (length - tokens)

    mask = create_block_mask(causal, rows, None, tokens, length, device=str(device), BLOCK_SIZE=FLEX_BLOCK)
    mask = paged.convert_logical_block_mask(mask, kv_len=problem.context_lens)
    attend, q = compiled(flex_attention, device), _queries(problem)
    return lambda: _flat(attend(q, *pools, block_mask=mask, enable_gqa=True))


def _varlen(problem: Problem) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    if "block_table" not in inspect.signature(varlen_attn).parameters:
        raise NotImplementedError("this torch's varlen_attn has no block_table")
    case, device = problem.case, problem.q.device
    longest = max(length for _, length in case.sequences)
    pages = -(-longest // VARLEN_PAGE)
    rows = len(case.sequences)
    pools = [problem.q.new_zeros(rows, pages * VARLEN_PAGE, case.kv_heads, case.head_dim) for _ in range(2)]
    for row, (_, length) in enumerate(case.sequences):
        for pool, seen in zip(pools, problem.gather(row, case.dtype), strict=True):
            pool[row, :length] = seen
    k, v = (pool.view(rows * pages, VARLEN_PAGE, case.kv_heads, case.head_dim) for pool in pools)
    tables = torch.arange(rows * pages, dtype=torch.int32, device=device).view(rows, pages)
    longest_q = max(tokens for tokens, _ in case.sequences)
    return lambda: varlen_attn(
        problem.q, k, v, problem.cu_q, None, longest_q, longest, window_size=(-1, 0), enable_gqa=True,
        seqused_k=problem.context_lens, block_table=tables,
    )  # fmt: skip


def linear(x: Tensor, dense: Tensor, int8: tuple[Tensor, Tensor] | None) -> dict[str, Maker]:
    """Return cuBLAS with weights of x's dtype; with int8 weights also torch's own product."""
    makers: dict[str, Maker] = {"cuBLAS": lambda: lambda: F.linear(x, dense)}
    if int8 is not None:
        packed = torch.ops.aten._weight_int8pack_mm
        makers["_weight_int8pack_mm"] = lambda: lambda: packed(x, *int8)
        makers["_int_mm of rounded rows"] = lambda: lambda: _int_mm(x, *int8)
    return makers


def _int_mm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Round rows to int8, multiply by cuBLAS, and scale: as many operations as torch needs."""
    own = x.float().abs().amax(1, keepdim=True) / 127
    sums = torch._int_mm((x / own).round().to(torch.int8), weight.T)  # pyright: ignore[reportPrivateImportUsage] - the only one
    return (sums * own * scale.float()).to(x.dtype)


def gated_linear(x: Tensor, dense: Tensor, int8: tuple[Tensor, Tensor] | None) -> dict[str, Maker]:
    """Return the same, each with the activation after it."""

    def activated(maker: Maker) -> Call:
        product = maker()
        return lambda: ops_torch.act_and_mul(product(), "silu")

    return {name: partial(activated, maker) for name, maker in linear(x, dense, int8).items()}


def elementwise(function: Callable[..., object], *args: object) -> dict[str, Maker]:
    """Return a function of torch's as it is and compiled."""
    device = next(arg for arg in args if isinstance(arg, Tensor)).device
    return {
        "eager": lambda: lambda: function(*args),
        "torch.compile": lambda: _bound(compiled(function, device), args),  # type: ignore[arg-type]
    }


def _bound(function: Callable[..., object], args: tuple[object, ...]) -> Call:
    return lambda: function(*args)


def experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> dict[str, Maker]:
    """Return grouped products over pairs sorted by expert, and cuBLAS for one expert after the other."""
    return {
        "grouped_mm": lambda: _grouped(x, weights, ids, gate_up, down),
        "cuBLAS by expert": lambda: _one_by_one(x, weights, ids, gate_up, down),
    }


def _grouped(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Call:
    grouped = getattr(F, "grouped_mm", None) or torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage] - before 2.10
    numbers = torch.arange(len(gate_up), device=x.device)
    top_k = ids.shape[1]

    def call() -> Tensor:
        order = ids.flatten().argsort()
        ends = (ids.flatten() == numbers[:, None]).sum(1).cumsum(0).int()
        inner = ops_torch.act_and_mul(grouped(x[order // top_k], gate_up.transpose(1, 2), offs=ends), "silu")
        outer = grouped(inner, down.transpose(1, 2), offs=ends) * weights.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add_(0, order // top_k, outer)

    return call


def _one_by_one(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Call:
    """Let the peer know beforehand which tokens go where, which a real step would have to ask the device for."""
    places = [(ids == expert).nonzero(as_tuple=True) for expert in range(len(gate_up))]
    used = [(e, tokens, weights[tokens, slot][:, None].to(x.dtype)) for e, (tokens, slot) in enumerate(places)]
    used = [(e, tokens, weight) for e, tokens, weight in used if len(tokens)]

    def call() -> Tensor:
        out = torch.zeros_like(x)
        for e, tokens, weight in used:
            inner = ops_torch.act_and_mul(F.linear(x[tokens], gate_up[e]), "silu")
            out.index_add_(0, tokens, F.linear(inner, down[e]) * weight)
        return out

    return call


def sampling(logits: Tensor, top_k: int, top_p: float) -> dict[str, Maker]:
    """Return the sorted way to choose by top_k and top_p; which token comes out is a matter of chance."""

    def choose(largest: Tensor, ids: Tensor) -> None:
        probabilities = largest.softmax(-1)
        kept = probabilities.masked_fill(probabilities.cumsum(-1) - probabilities > top_p, 0)
        ids.gather(-1, (kept / torch.empty_like(kept).exponential_()).argmax(-1, keepdim=True))

    def whole() -> None:
        largest, ids = logits.sort(dim=-1, descending=True)
        choose(largest.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= top_k, -torch.inf), ids)

    return {"sort": lambda: whole, "topk": lambda: lambda: choose(*logits.topk(top_k))}


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keep what peers warn of from being an error: they are guests here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
