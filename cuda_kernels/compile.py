"""From a .cu file and its -D settings to PTX and machine code, kept on disk.

A kernel is specialised by macros (`HEAD_DIM=128`), never by templates across the language border, so one small
module per configuration is built when it is first needed: by NVRTC where its library can be loaded, else by nvcc.
Headers are expanded before the cache key is made.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import kernel_cache
from cuda_kernels import nvrtc
from cuda_kernels.nvrtc import CompileError

SOURCES = Path(__file__).parent
OLDEST = 80  # compute capability 8.0, for cp.async and bfloat16 tensor cores
# Flush denormals as CuPy and every fast attention kernel do; registers and spills are printed into the log.
OPTIONS = ("--std=c++17", "-ftz=true", "--ptxas-options=-v")
NO_COMPILER = "neither NVRTC (pip install nvidia-cuda-nvrtc) nor nvcc was found"
_USAGE = re.compile(
    r"Compiling entry function '(?P<entry>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.S,
)


@dataclass(frozen=True)
class Usage:
    """What one entry point takes of a multiprocessor, as ptxas reported it."""

    registers: int
    spill_bytes: int


@dataclass(frozen=True)
class Built:
    """One compiled source: files that stay in the cache."""

    ptx_path: Path
    cubin_path: Path
    log: str

    @property
    def ptx(self) -> str:
        return self.ptx_path.read_text()

    @property
    def binary_path(self) -> Path:
        """What a driver is handed: machine code, or, where only that was made, PTX, which it compiles itself."""
        return self.cubin_path if self.cubin_path.stat().st_size else self.ptx_path

    @property
    def usage(self) -> dict[str, Usage]:
        """Registers and spills of each entry point."""
        return {
            found["entry"]: Usage(int(found["registers"]), int(found["stores"]) + int(found["loads"]))
            for found in _USAGE.finditer(self.log)
        }


def expand(name: str) -> str:
    """Return the text of a source with its headers expanded."""
    return kernel_cache.expand(SOURCES / name)


def compiler_version() -> str | None:
    """Return which compiler will be used, with its version; None where there is none."""
    if nvrtc.library() is not None:
        return f"nvrtc {nvrtc.version()}"
    return _nvcc_version()


@functools.cache
def _nvcc_version() -> str | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = _run([nvcc, "--version"]).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    return f"nvcc {found[1] if found else said}"


def target(capability: tuple[int, int]) -> str:
    """Return what to compile for on a GPU of this compute capability.

    Its own machine code where the compiler can make it; for a GPU newer than the compiler, PTX of the newest
    architecture below it, which the driver compiles. (No kernel needs `sm_90a`, which runs only on 9.0.)

    Raises:
        CompileError: The GPU is too old, or there is no compiler.
    """
    wanted = capability[0] * 10 + capability[1]
    if wanted < OLDEST:
        raise CompileError(
            f"a GPU of compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 or newer"
        )
    known = _architectures()
    return f"sm_{wanted}" if wanted in known else f"compute_{max(arch for arch in known if arch < wanted)}"


def _architectures() -> tuple[int, ...]:
    if nvrtc.library() is not None:
        return nvrtc.architectures()
    if shutil.which("nvcc") is None:
        raise CompileError(NO_COMPILER)
    said = _run(["nvcc", "--list-gpu-arch"]).stdout
    return tuple(int(number) for number in re.findall(r"compute_(\d+)$", said, re.M))


def build(name: str, defines: Mapping[str, str | int], arch: str) -> Built:
    """Compile a source of this package, or take it from the cache.

    Args:
        name: File name, for example "norm.cu".
        defines: Macros.
        arch: For example "sm_90", or "compute_90" for PTX alone.
    Raises:
        CompileError: It does not compile, or there is no compiler.
    """
    return build_text(expand(name), name, defines, arch)


def build_text(source: str, name: str, defines: Mapping[str, str | int], arch: str) -> Built:
    """Compile an expanded text; `name` is only shown in messages."""
    version = compiler_version()
    if version is None:
        raise CompileError(NO_COMPILER)
    options = [f"-D{key}={value}" for key, value in sorted(defines.items())]
    key = hashlib.sha256("\0".join([version, arch, *OPTIONS, *options, source]).encode()).hexdigest()[:32]
    stem = kernel_cache.directory() / key
    built = Built(stem.with_suffix(".ptx"), stem.with_suffix(".cubin"), "")
    log_path = stem.with_suffix(".log")  # written last: its presence says that the others are whole
    if not log_path.exists():
        compile_now = _by_nvrtc if version.startswith("nvrtc") else by_nvcc
        ptx, cubin, log = compile_now(source, name, options, arch)
        for path, data in ((built.ptx_path, ptx), (built.cubin_path, cubin), (log_path, log.encode())):
            _write_whole(path, data)
    return Built(built.ptx_path, built.cubin_path, log_path.read_text())


def build_all(jobs: Iterable[tuple[str, Mapping[str, str | int], str]], processes: int) -> list[str | None]:
    """Fill the cache in several processes, as NVRTC compiles one program at a time in each.

    Args:
        jobs: Arguments of `build`.
    Returns:
        What the compiler complained of, for each job; None where it did not.
    """

    def one(job: tuple[str, Mapping[str, str | int], str]) -> str | None:
        name, defines, arch = job
        macros = [f"{key}={value}" for key, value in defines.items()]
        command = [sys.executable, "-m", "cuda_kernels.compile", name, arch, *macros]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SOURCES.parent)  # noqa: S603
        return done.stderr.strip() if done.returncode else None

    with ThreadPoolExecutor(processes) as threads:
        return list(threads.map(one, jobs))


def _by_nvrtc(source: str, name: str, options: list[str], arch: str) -> tuple[bytes, bytes, str]:
    return nvrtc.compile_program(source, name, arch, [*OPTIONS, *options])


def by_nvcc(source: str, name: str, options: list[str], arch: str) -> tuple[bytes, bytes, str]:
    """Compile an expanded text with the toolkit's compiler. Arguments, result and errors are those of NVRTC's."""
    with tempfile.TemporaryDirectory() as folder:
        text, ptx, cubin = (Path(folder, f"kernel.{kind}") for kind in ("cu", "ptx", "cubin"))
        text.write_text(source)
        logs: list[str] = []
        virtual = arch.replace("sm_", "compute_")
        commands = [["nvcc", "-ptx", f"-arch={virtual}", *OPTIONS, *options, str(text), "-o", str(ptx)]]
        if arch != virtual:
            commands.append(["ptxas", "-v", f"-arch={arch}", str(ptx), "-o", str(cubin)])
        for command in commands:
            done = _run(command)
            logs.append(done.stderr)
            if done.returncode:
                raise CompileError(f"{name}: {done.stderr}")
        return ptx.read_bytes(), cubin.read_bytes() if cubin.exists() else b"", "".join(logs)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - nvcc, on our own text


def _write_whole(path: Path, data: bytes) -> None:
    """Write so that another process sees the whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    Path(temporary).replace(path)


def _main(name: str, arch: str, *macros: str) -> None:
    """Be one of the processes of `build_all`."""
    try:
        build(name, dict(macro.split("=", 1) for macro in macros), arch)
    except CompileError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    _main(*sys.argv[1:])
