"""Tests of the tests: each of these one-line bugs in a CPU kernel must be caught by one of the checks."""

from __future__ import annotations

import platform
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cpu_kernels import compile as compiling
from cpu_kernels import library
from tests.cpu_kernels.cases import CHECKS, poisoned

# One target on every x86 machine: a bug in code that this machine's instructions leave out could not be caught.
TARGET = "-march=x86-64-v3" if platform.machine() in {"x86_64", "AMD64"} else "-march=native"
# Unoptimised: most of the time goes to the compiler.
FLAGS = ("-std=c++20", "-O0", "-w", "-fPIC", "-pthread", TARGET)


class Bug(NamedTuple):
    """A replacement in an expanded source, and the check that must fail."""

    source: str
    old: str
    new: str
    check: str


BUGS = {
    "norm of what was before the addition": Bug("norm", "residual ? total : x;", "x;", "norm"),
    "a row's padding counts": Bug("norm", "(f32)a.width +", "(f32)((a.width + 15) / 16 * 16) +", "norm"),
    "rows of one stride": Bug("norm", "row * a.x_stride", "row * a.width", "norm"),
    "gate and up swapped": Bug(
        "act",
        "activate(load<T>(gate + i, left), a->activation) * load<T>(gate + a->width + i, left)",
        "load<T>(gate + i, left) * activate(load<T>(gate + a->width + i, left), a->activation)",
        "act",
    ),
    "one activation for both": Bug("act", "kind == SILU ? silu(x)", "true ? silu(x)", "act"),
    "a row does not see its token": Bug("step", "a->positions[i] + 1", "a->positions[i]", "prepare"),
    "tables in the order of the batch": Bug("step", "a->rows[i] * a->table_stride", "i * a->table_stride", "prepare"),
    "logits are not rounded": Bug("linear", "if (dtype == F32) return v;", "return v;", "linear"),
    "rotated the other way": Bug("kv_write", "first * c - second * s", "first * c + second * s", "write_kv"),
    "padding is written": Bug(
        "kv_write", "a.writes ? a.slots[t] : -1", "a.writes ? std::max<i64>(a.slots[t], 1) : -1", "write_kv"
    ),
    "a scale of 128": Bug("kv_write", "most / 127.f", "most / 100.f", "write_kv"),
    "values are the keys": Bug("kv_write", "(a.has_values ? a.kv_heads : 0)", "0", "write_kv"),
    "keys over values": Bug(
        "kv_write", "write_head<T>(a, a.v, a.v_scale", "write_head<T>(a, a.k, a.k_scale", "write_kv"
    ),
    "no factor on the angles": Bug("kv_write", "std::cos(angle) * (f32)a->factor", "std::cos(angle)", "write_kv"),
    "norm after the rotation": Bug(
        "kv_write", "if (a.qk_norm) {", "if (a.qk_norm) { rotate(head, a.dim / 2, cos, sin);", "write_kv"
    ),
    "the last keys need no mask": Bug("attention", "low == 0 && high == KEYS", "low == 0", "prefill"),
    "integers need no scale": Bug("attention", "high == KEYS && !k_scale", "high == KEYS", "int8_kv"),
    "whole pieces have no cap": Bug("attention", "!k_scale && a.softcap == 0", "!k_scale", "softcap"),
    "a window only of masked pieces": Bug("attention", "low == 0 && high == KEYS", "high == KEYS", "window"),
    "a token sees not itself": Bug("attention", "own + 1 - first, keys", "own - first, keys", "decode"),
    "a token sees the next": Bug("attention", "own + 1 - first, keys", "own + 2 - first, keys", "prefill"),
    "the window is one too wide": Bug("attention", "own - a.window + 1 - first", "own - a.window - first", "window"),
    "the window is one too narrow": Bug(
        "attention", "own - a.window + 1 - first", "own - a.window + 2 - first", "window"
    ),
    "blocks out of the window are read": Bug(
        "attention", "a.window ? std::max<i64>(0, position + first / group - a.window + 1) : 0", "0", "window"
    ),
    "heads interleaved": Bug(
        "attention",
        ", head = item.kv_head * group + (item.first + r) % group",
        ", head = item.kv_head + (item.first + r) % group * a.kv_heads",
        "decode",
    ),
    "no rescaling": Bug("attention", "* factor[r];\n    const auto add", "* 1.f;\n    const auto add", "decode"),
    "parts added without their weights": Bug(
        "attention", "parts[p].value + r * room + d) * factor[p]", "parts[p].value + r * room + d)", "decode"
    ),
    "copied keys a lane late": Bug(
        "attention", "(d + i) * KEYS + j, square", "(d + i) * KEYS + (j ^ LANES), square", "prefill"
    ),
    "copied values of the keys": Bug("attention", "load<KV>(v + from.at", "load<KV>(k + from.at", "prefill"),
    "copies are not rescaled": Bug("attention", "Float32::load(to) * factor[r] +", "Float32::load(to) +", "prefill"),
    "rows of a matrix not turned": Bug("attention", "for (int round = 1;", "for (int round = 2;", "prefill"),
    "the first table for all": Bug("attention", "a.tables + item.row * a.table_stride +", "a.tables +", "decode"),
    "a piece begins with the first block": Bug(
        "attention", "table_stride + first / a.block_size", "table_stride", "decode"
    ),
    "the same block again": Bug("attention", "block++, offset = 0", "offset = 0", "decode"),
    "a head's keys for all": Bug("attention", "slot_stride + item.kv_head * a.dim", "slot_stride", "decode"),
    "keys past the end": Bug("attention", "std::clamp<i64>(item.end - first, 0, KEYS)", "KEYS", "decode"),
    "no softcap": Bug("attention", "if (a.softcap > 0)", "if (false)", "softcap"),
    "the key's scale for values": Bug("attention", "v_scale[j] = a.v_scale[", "v_scale[j] = a.k_scale[", "int8_kv"),
    "a head's remainder is lost": Bug("attention", "if (whole < dim)", "if (false)", "decode"),
    "rows in each other's place": Bug(
        "linear", "(first_row + r) * p.y_stride", "(first_row + (r ^ 1)) * p.y_stride", "linear"
    ),
    "the last inputs are lost": Bug("linear", "for (; k < inputs; k++) add(k, 0);", "", "linear"),
    "no bias": Bug("linear", "if (p.bias) sum +=", "if (false) sum +=", "linear"),
    "the gate's bias for both": Bug("linear", "finished(p, scaled, at + width)", "finished(p, scaled, at)", "gated"),
    "the half inside a panel": Bug("linear", "shift = width % PANEL;", "shift = 0;", "gated"),
    "no panel behind the partner": Bug("linear", "i + 1 < partners.count ? up", "false ? up", "gated"),
    "the first partner for all": Bug("linear", "up + i * size, behind", "up, behind", "gated"),
    "weights packed a row late": Bug(
        "pack",
        "place(a->kind, n, k) * size, row + k * size",
        "place(a->kind, n + 1, k) * size, row + k * size",
        "linear",
    ),
    "the offset of activations": Bug("linear", "-DOT_OFFSET * total", "-DOT_OFFSET * total + 1", "int8"),
    "a block's neighbour's scale": Bug(
        "linear", "x.scale[r * x.blocks + block]", "x.scale[r * x.blocks + (block ? block - 1 : 0)]", "int8"
    ),
    "NaN quantised to a number": Bug("linear", "= scale + sum(check)", "= scale", "isolation"),
    "the minimum of unrounded activations": Bug(
        "linear",
        "scales.offset[v] * x.total[r * x.pieces + piece]",
        "scales.offset[v] * 0.99f * x.total[r * x.pieces + piece]",
        "blocks",
    ),
    "the first group's scales for all": Bug(
        "linear",
        "panel = GroupScales::read(scales, s, panel, k);",
        "panel = GroupScales::read(scales, s, panel, 0);",
        "blocks",
    ),
    "a group's scale a block late": Bug(
        "linear", "x.blocks + piece * PIECE", "x.blocks + (piece ? piece - 1 : 0) * PIECE", "blocks"
    ),
    "halves of a byte swapped": Bug("pack", "k % BLOCK / 16 * 4 & 0xf", "(k % BLOCK / 16 ^ 1) * 4 & 0xf", "blocks"),
    "a zero point of 7": Bug("linear", "-8.f * to.scale[v]", "-7.f * to.scale[v]", "whole_blocks"),
    "a zero point that is added": Bug(
        "linear", "to.offset[v] *= -to.scale[v]", "to.offset[v] *= to.scale[v]", "whole_blocks"
    ),
    "the outer scale of scales for minima": Bug("linear", "all.outer[which][v]", "all.outer[0][v]", "whole_blocks"),
    "totals of 32 for groups of 16": Bug(
        "linear", "i < first + layout.piece; i++", "i < first + BLOCK && i < BLOCK; i++", "whole_blocks"
    ),
    "a row of the next output": Bug(
        "pack",
        "scales.scale[n % PANEL / LANES][n % LANES]",
        "scales.scale[n % PANEL / LANES][(n + 1) % LANES]",
        "block_rows",
    ),
    "one kind for both products": Bug(
        "moe", "a->down_kind, NO_ACTIVATION", "a->gate_up_kind, NO_ACTIVATION", "block_experts"
    ),
    "the first piece for all": Bug("linear", "stored = panel + k * bytes", "stored = panel", "linear"),
    "the first piece widened for all": Bug("linear", "panel + first * PANEL * size_of(kind)", "panel", "linear"),
    "a piece's inputs are the first": Bug("linear", "layout.from(row, k)", "layout.from(row, 0)", "linear"),
    "a tile's sums over the first's": Bug("linear", "sums + (row - begin) * PANEL", "sums", "linear"),
    "a smaller tile's row": Bug(
        "linear", "std::max<i64>(0, tile - large) * small_rows", "std::max<i64>(0, tile - large) * MOST_ROWS", "linear"
    ),
    "the last panels left out": Bug("linear", "* std::max<i64>(1, left / 2)", "* (left / 2)", "linear"),
    "the first tiles again": Bug(
        "linear", "layout, first, last, own + i", "layout, 0, last - first, own + i", "linear"
    ),
    "pairs widened in the other order": Bug(
        "linear",
        "store(to + PANEL, bits_as<vf>(pair & 0xffff0000u))",
        "store(to + PANEL, bits_as<vf>(pair << 16))",
        "linear",
    ),
    "INT8 widened from the first piece": Bug(
        "linear", "widen_numbers<Int8>(from,", "widen_numbers<Int8>(panel,", "int8_exact"
    ),
    "a scale of the first piece": Bug("linear", "block = (first + k) / BLOCK", "block = k / BLOCK", "int8"),
    "one row for another's": Bug("linear", "p.index ? p.index[row] : row", "row", "moe"),
    "padding goes to an expert": Bug("moe", "if (places[i] >= 0)", "if (true)", "moe"),
    "not renormalised": Bug("moe", "a->weights[t * a->top_k + i] /= total", "(void)total", "route"),
    "the last of equals": Bug("moe", "x < y)", "x > y)", "route"),
    "small numbers without their digits": Bug("sample", "* (u / (1.f - rest))", "", "draw"),
    "another row's noise": Bug("sample", "a.keys[2 * r + 1]", "a.keys[1]", "draw"),
    "parts are skipped too soon": Bug("sample", "best - 2 * MARGIN - row", "best + 2 - row", "draw"),
    "a second one is not seen": Bug("sample", "second = std::min(best, noisy[lane]);", "", "undecided"),
    "no room is enough": Bug("sample", "if (likelier < limit * (1 - MASS_MARGIN)) return id;", "", "draw"),
    "any room is enough": Bug("sample", "if (likelier < limit * (1 - MASS_MARGIN))", "", "draw"),
    "a likelier one is cut off too": Bug("sample", "floor = row.scores[id];", "floor = row.scores[id] + 0.5f;", "draw"),
    "the cut itself is cut off": Bug("sample", "std::nextafter(cut, -INFINITY)", "cut", "draw"),
    "one too many is kept": Bug(
        "sample", "row.kth_largest((i64)params[1])", "row.kth_largest((i64)params[1] + 1)", "draw"
    ),
    "top_p of what min_p cut off too": Bug(
        "sample", "row.mass(floor);\n  while", "row.mass(-INFINITY);\n  while", "draw"
    ),
    "the largest of whole vectors": Bug("argmax", "at < a.vocab; at++", "false; at++", "argmax"),
    "NaN is smaller than all": Bug("argmax", "nan |= own != own;", "", "argmax"),
    "NaN at the end is smaller": Bug("argmax", "broken |= std::isnan(logits[at]);", "", "argmax"),
    "infinity is a token": Bug("argmax", "broken || !std::isfinite(top)", "broken", "argmax"),
    "a block later than the largest": Bug("argmax", "if (any(found)) break;", "", "argmax"),
    "the top of whole vectors": Bug("logprobs", "i < count; i++) top", "i < 0; i++) top", "logprobs"),
    "the vocabulary has no end": Bug(
        "logprobs",
        "scores.begin() + vocab, scores.end(), -INFINITY",
        "scores.begin() + vocab, scores.end(), 0.f",
        "logprobs",
    ),
    "equals beyond the count": Bug("logprobs", "row.scores[i] > bound) ids", "row.scores[i] >= bound) ids", "logprobs"),
    "NaN is no logit": Bug("logprobs", "row.has_nan ||", "", "logprobs"),
    "a rank from 0": Bug("logprobs", "i64 rank = 1;", "i64 rank = 0;", "logprobs"),
    "a word of the mask too early": Bug("mask", "a->masks + i * a->words", "a->masks", "mask"),
    "a word with any token is whole": Bug("mask", "if (word == -1) continue;", "if (word) continue;", "mask"),
    "load counts pairs of all": Bug("moe", "a->load[a->ids[i]]++;", "a->load[0]++;", "moe"),
}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """Keep what is compiled here away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIO_LLM_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


def run(library_path: Path, check: str) -> None:
    """Run a check on a library of its own."""
    torch.manual_seed(5)
    with library.using(library.open_library(library_path)), poisoned():
        library.set_num_threads(2)
        CHECKS[check]()


def test_checks_pass_without_a_bug() -> None:
    """The library that the bugs are put into passes what they must fail."""
    path = compiling.build(flags=FLAGS)
    for check in {bug.check for bug in BUGS.values()}:
        run(path, check)


class Apart:
    """A process for checks that may read and write anywhere. If one crashes, the next check has a new process."""

    def __init__(self) -> None:
        self._executor: ProcessPoolExecutor | None = None

    def run(self, library_path: Path, check: str) -> None:
        """Run a check. Raises what it raises, and BrokenProcessPool if it crashes."""
        if self._executor is None:
            self._executor = ProcessPoolExecutor(1, get_context("spawn"))
        try:
            self._executor.submit(run, library_path, check).result()
        except BrokenProcessPool:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        if self._executor is not None:
            self._executor.shutdown()
        self._executor = None


@pytest.fixture(scope="module")
def apart() -> Generator[Apart]:
    """Return the process."""
    process = Apart()
    yield process
    process.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_bugs_are_caught(name: str, apart: Apart) -> None:
    """Each bug is there once, compiles, and fails its check or crashes it."""
    bug = BUGS[name]
    text = compiling.expand(bug.source)
    assert text.count(bug.old) >= 1, "the source has changed"
    path = compiling.build(flags=FLAGS, texts={bug.source: text.replace(bug.old, bug.new, 1)})
    with pytest.raises((AssertionError, BrokenProcessPool)):
        apart.run(path, bug.check)
