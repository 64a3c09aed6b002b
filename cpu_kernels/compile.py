"""Compile the C++ sources to one shared library for this processor, cached on disk.

The sources are compiled in a few parts, several at a time, and the objects are linked. Objects and libraries are kept
under the hash of all that went into them: expanded text, flags, compiler and processor.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import chain
from pathlib import Path
from typing import IO

import kernel_cache

SOURCES = Path(__file__).parent
# The slowest to compile first. Small sources share a part: most of the time goes into the headers.
PARTS = (
    ("attention",),
    ("linear",),
    ("moe", "kv_write", "norm", "act"),
    ("sample", "argmax", "logprobs", "mask"),
    ("pack", "pool", "step"),
)
NAMES = tuple(name for part in PARTS for name in part)
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-pthread")
NO_COMPILER = "no C++ compiler was found: install g++ or clang++, or pip install 'trio-llm[cpu]'"
_POLL_S = 0.2
_TERMINATE_S = 2.0
_TIMEOUT_S = 300  # a compiler that hangs is reported, not waited for (a guess)


class CompileError(Exception):
    """There is no compiler, or it refused a source."""


def expand(*names: str) -> str:
    """Return the text of sources with their headers expanded."""
    return kernel_cache.expand(*[SOURCES / f"{name}.cpp" for name in names])


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: $CXX, c++, g++, clang++, or zig from the ziglang wheel.

    Raises:
        CompileError: There is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in (named, ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise CompileError(NO_COMPILER)


@functools.cache
def processor() -> str:
    """Return an identity of this processor's instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.split("\t")[0].split(":")[0].strip() in wanted))


def native_flags() -> tuple[str, ...]:
    """Return the flags that compile for this processor."""
    # Intel's cores compute dot products of bfloat16 pairs at half the rate of the float32 that replaces them.
    return ("-march=native", *(("-DSLOW_BF16_DOT",) if "GenuineIntel" in processor() else ()))


def build(
    report: Callable[[int, int], None] = lambda _, __: None,
    *,
    flags: Sequence[str] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Compile and link, or take from the cache; return the library's path.

    Args:
        report: Receives how many of how many parts are compiled, a few times a second; not called where nothing has to
            be. What it raises ends the compilers.
        flags: Of the compiler; None means FLAGS and those for this processor.
        texts: Expanded sources in place of the package's own, by name. They are parts of their own.
    Raises:
        CompileError: There is no compiler, or it refused a source.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *native_flags()) if flags is None else flags
    parts = {"+".join(part): expand(*part) for part in _parts(set(texts or ()))} | dict(texts or {})
    base = [*compiler, _version(tuple(compiler)), processor(), *flags]
    objects = [_keyed(".o", *base, text) for text in parts.values()]
    library = _keyed(".so", *base, *map(str, objects))
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "cpu.lock").open("w") as lock:
        while not _locked(lock):  # Processes that start together compile once.
            report(0, len(parts))
            time.sleep(_POLL_S)
        _build_missing(compiler, flags, parts, dict(zip(parts, objects, strict=True)), report)
        if not library.exists():
            _make(library, [*compiler, "-shared", *flags, *map(str, objects), "-o"], "linking")
    return library


def _parts(alone: AbstractSet[str]) -> Iterable[tuple[str, ...]]:
    """Return the parts in which the sources are compiled. One of `alone` is one, and so are its companions."""
    return chain.from_iterable(zip(part, strict=True) if alone & set(part) else [part] for part in PARTS)


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _build_missing(
    compiler: Sequence[str],
    flags: Sequence[str],
    parts: Mapping[str, str],
    objects: Mapping[str, Path],
    report: Callable[[int, int], None],
) -> None:
    missing = [name for name, path in objects.items() if not path.exists()]
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as threads:
        jobs = [threads.submit(_compile, compiler, flags, name, parts[name], objects[name], stop) for name in missing]
        try:
            for done, job in enumerate(jobs):
                report(done, len(jobs))
                while wait((job,), _POLL_S).not_done:
                    report(done, len(jobs))
                job.result()
        except BaseException:
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    report(len(missing), len(missing))


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"]).stdout


def _keyed(kind: str, *parts: str) -> Path:
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return kernel_cache.directory() / f"cpu-{key}{kind}"


def _compile(
    compiler: Sequence[str], flags: Sequence[str], name: str, text: str, to: Path, stop: threading.Event
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"{name}.cpp")
        source.write_text(text, encoding="utf-8")
        _make(to, [*compiler, *flags, "-c", str(source), "-o"], name, stop)


def _make(path: Path, command: Sequence[str], what: str, stop: threading.Event | None = None) -> None:
    """Run a command that writes `path`, so that another process sees the whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        try:
            done = _run([*command, str(made)], stop)
        except subprocess.TimeoutExpired:
            raise CompileError(f"{what}: the compiler did not end within {_TIMEOUT_S} s") from None
        if done.returncode:
            raise CompileError(f"{what}: {done.stderr.strip()}")
        made.replace(path)


def _run(command: Sequence[str], stop: threading.Event | None = None) -> subprocess.CompletedProcess[str]:
    """Run a compiler. Raises TimeoutExpired if it takes too long, or once `stop` is set."""
    end_s = time.monotonic() + _TIMEOUT_S
    # A session of its own: a compiler has children, which end with it.
    with subprocess.Popen(  # noqa: S603 - a compiler, on our own text
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while True:
            try:
                out, err = process.communicate(timeout=_POLL_S)
                return subprocess.CompletedProcess(command, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                if time.monotonic() > end_s or (stop is not None and stop.is_set()):
                    _end(process)
                    raise


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)  # A compiler removes its temporary files.
    try:
        process.wait(_TERMINATE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
