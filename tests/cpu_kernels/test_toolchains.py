"""The CPU kernels under other instruction sets, other compilers and the sanitizers."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_kernels import compile as compiling
from cpu_kernels import library
from cpu_kernels.library import kernels
from tests.cpu_kernels.cases import check_gated, check_linear, check_moe, poisoned

ROOT = Path(__file__).parents[2]
ON_X86 = platform.machine() == "x86_64"
INSTRUCTION_SETS = ["haswell", pytest.param("x86-64", marks=pytest.mark.slow)]
SANITIZE = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a cache of its own."""
    return {**os.environ, "TRIO_LLM_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}


def zig() -> list[str]:
    """Return the command of zig's clang; skip without it, except in CI."""
    if importlib.util.find_spec("ziglang") is None:
        if os.environ.get("CI"):
            pytest.fail("CI must cross-compile: pip install ziglang")
        pytest.skip("no cross compiler: pip install ziglang")
    return [sys.executable, "-m", "ziglang", "c++"]


def run_checks(environment: dict[str, str], *flags: str) -> None:
    """Run every check in a process of its own."""
    command = [sys.executable, "-m", "tests.cpu_kernels.cases", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not ON_X86, reason="x86 only")
@pytest.mark.parametrize("arch", INSTRUCTION_SETS)
def test_other_instruction_sets(arch: str, environment: dict[str, str]) -> None:
    """Eight lanes without integer dot products, and four, as on machines without AVX2."""
    run_checks(environment, "-O1", f"-march={arch}")


@pytest.mark.skipif("avx512_bf16" not in compiling.processor(), reason="no dot products of bfloat16")
def test_bfloat16_in_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 are right in the way that this processor's maker does not call for, too."""
    monkeypatch.setenv("TRIO_LLM_CACHE_DIR", str(tmp_path))
    other = () if "-DSLOW_BF16_DOT" in compiling.native_flags() else ("-DSLOW_BF16_DOT",)
    flags = ("-std=c++20", "-O1", "-fPIC", "-pthread", "-march=native", *other)
    with library.using(library.open_library(compiling.build(flags=flags))), poisoned():
        check_linear()
        check_gated()
        check_moe()


@pytest.mark.parametrize(("vendor", "slow"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_dot_products_of_bfloat16_depend_on_the_maker(vendor: str, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Intel's processors go without them: there they take longer than what replaces them."""
    monkeypatch.setattr(compiling, "processor", lambda: f"vendor_id\t: {vendor}\nflags\t\t: avx512_bf16")
    assert ("-DSLOW_BF16_DOT" in compiling.native_flags()) == slow


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="the preloaded runtimes are g++'s")
def test_sanitizers_find_nothing(environment: dict[str, str]) -> None:
    """No kernel reads or writes outside its tensors, and nothing is undefined, in any check."""
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    extra = {"CXX": "g++", "LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0"}
    run_checks({**environment, **extra}, "-O1", *SANITIZE)


@pytest.mark.skipif(not shutil.which("g++"), reason="g++'s thread sanitizer")
def test_threads_do_not_race(tmp_path: Path) -> None:
    """The pool, used by two callers, with pauses in which its workers sleep, has no data race."""
    program = tmp_path / "pool"
    sources = [ROOT / "tests/cpu_kernels/pool_main.cpp", ROOT / "cpu_kernels/pool.cpp"]
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", "-w", f"-I{ROOT / 'cpu_kernels'}"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address space layout is too random for the thread sanitizer")
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.parametrize("part", compiling.PARTS, ids="+".join)
def test_kernels_compile_for_neon(part: tuple[str, ...], tmp_path: Path, environment: dict[str, str]) -> None:
    """Zig compiles every source for a 64-bit ARM server, with integer dot products."""
    source = tmp_path / "part.cpp"
    source.write_text(compiling.expand(*part))
    target = ["-target", "aarch64-linux-gnu", "-mcpu=neoverse_n1", "-std=c++20", "-O0", "-fPIC"]
    command = [*zig(), *target, "-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("processor", ["x86_64", "haswell", "x86_64_v4"])
def test_clang_moves_lanes_without_loops(processor: str, tmp_path: Path, environment: dict[str, str]) -> None:
    """Clang, too, makes straight instructions of what moves lanes, for vectors of every width: no jumps, no calls."""
    source, out = tmp_path / "moves.cpp", tmp_path / "moves.s"
    source.write_text(
        '#include "common.h"\n'
        'extern "C" void transposed(vf* v) { transpose(*(vf(*)[LANES])v); }\n'
        'extern "C" void added(vf* v, f32* to) { *v = sums(v), to[0] = sum(*v), to[1] = largest(*v); }\n'
    )
    target = ["-target", "x86_64-linux-gnu", f"-mcpu={processor}", "-g0", "-w", f"-I{ROOT / 'cpu_kernels'}"]
    command = [*zig(), *compiling.FLAGS, *target, "-S", str(source), "-o", str(out)]
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    text = out.read_text()
    assert "transposed:" in text
    assert re.findall(r"^\s+(?:j|call)\w*\s.*", text, re.M) == []


@pytest.mark.skipif(not (ON_X86 and shutil.which("g++")), reason="what g++ makes on x86")
@pytest.mark.parametrize("arch", ["haswell", "x86-64-v4"])
def test_numbers_are_widened_by_one_instruction(arch: str, tmp_path: Path) -> None:
    """g++ made five, and 35 of eight bytes that become floats: INT8 products of one row took twice as long."""
    source, out = tmp_path / "widen.cpp", tmp_path / "widen.s"
    source.write_text(
        '#include "common.h"\n'
        'extern "C" void words(const u16* from, vu* to) { *to = widened(from); }\n'
        'extern "C" void bytes(const s8* from, vi* to) { *to = widened(from); }\n'
        'extern "C" void pairs(const u8* from, vi* to) { *to = widened_pairs(from); }\n'
    )
    command = [
        "g++",
        *compiling.FLAGS,
        f"-march={arch}",
        f"-I{ROOT / 'cpu_kernels'}",
        "-S",
        str(source),
        "-o",
        str(out),
    ]
    subprocess.run(command, capture_output=True, text=True, check=True)
    done = re.findall(r"^\s+(v\w+)\s", out.read_text(), re.M)
    widening = [name for name in done if not name.startswith(("vmov", "vzero"))]
    assert widening == ["vpmovzxwd", "vpmovsxbd", "vpmovsxbw"]


def test_the_cache_is_keyed_by_all_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text, flag or processor is another library; the same again compiles nothing."""
    monkeypatch.setenv("TRIO_LLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "PARTS", (("act",),))
    told: list[tuple[int, int]] = []
    first = compiling.build(lambda *at: told.append(at), flags=("-std=c++20", "-O0", "-fPIC"))
    assert list(dict.fromkeys(told)) == [(0, 1), (1, 1)]
    told.clear()
    assert compiling.build(lambda *at: told.append(at), flags=("-std=c++20", "-O0", "-fPIC")) == first
    assert not told
    others = [compiling.build(flags=("-std=c++20", "-O0", "-fPIC", "-DX"))]
    others.append(compiling.build(flags=("-std=c++20", "-O0", "-fPIC"), texts={"act": compiling.expand("act") + "\n"}))
    monkeypatch.setattr(compiling, "processor", lambda: "another")
    others.append(compiling.build(flags=("-std=c++20", "-O0", "-fPIC")))
    assert len({first, *others}) == 4


def test_no_compiler_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler the error names what to install; a source that does not compile names itself."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(compiling.CompileError, match=r"install g\+\+ or clang\+\+, or pip install 'trio-llm\[cpu\]'"):
        compiling.find_compiler()


def test_a_source_that_does_not_compile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message holds the source's name and the compiler's own words, and nothing broken is kept."""
    monkeypatch.setenv("TRIO_LLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "PARTS", (("act",),))
    with pytest.raises(compiling.CompileError, match=r"act: (?s:.*)error"):
        compiling.build(texts={"act": "this is no C++"})
    assert list(tmp_path.rglob("*.so")) == list(tmp_path.rglob("*.o")) == []


def test_what_interrupts_the_compilers_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a compiler runs, here one that would take an hour: none goes on, and nothing half made is kept."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] || {{ sleep 3600 & echo $! >> {tmp_path}/running; wait; }}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TRIO_LLM_CACHE_DIR", str(tmp_path / "cache"))

    def report(done: int, total: int) -> None:
        if (tmp_path / "running").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiling.build(report)
    for pid in (tmp_path / "running").read_text().split():
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"
    assert [path.name for path in (tmp_path / "cache" / "kernels").iterdir()] == ["cpu.lock"]


def test_waiting_for_another_process_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while another process compiles does not wait for that process."""
    monkeypatch.setenv("TRIO_LLM_CACHE_DIR", str(tmp_path))
    (tmp_path / "kernels").mkdir()

    def report(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with (tmp_path / "kernels" / "cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(KeyboardInterrupt):
            compiling.build(report)


def test_every_entry_point_is_declared() -> None:
    """Each kernel's struct could be read from its source."""
    assert set(kernels()) == {
        "act", "argmax", "draw", "embed", "linear", "logprobs", "mask", "moe", "norm", "pack", "pack_blocks",
        "paged_attention", "prepare_contexts", "prepare_tables", "rope_angles", "route", "write_kv",
    }  # fmt: skip
