"""Compilation, its cache, and what is read out of sources and logs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cuda_kernels import compile as compiling
from cuda_kernels import nvrtc
from cuda_kernels.signature import Parameter, entries
from tools.kernel_lab.specialisations import attention, others

SOURCE = """extern "C" __global__ void __launch_bounds__(32)
    twice(const float* __restrict__ x, float* y, int n) { y[n] = 2.f * x[n]; }"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache of its own."""
    monkeypatch.setenv("TRIO_LLM_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


def test_a_kernel_compiles_without_a_gpu(cache: Path) -> None:
    """PTX, machine code and the registers of each entry come out, and stay on disk."""
    built = compiling.build_text(SOURCE, "twice.cu", {}, "sm_90")
    assert ".entry twice(" in built.ptx and built.cubin_path.read_bytes()[:4] == b"\x7fELF"
    assert built.usage["twice"].registers > 0 and built.usage["twice"].spill_bytes == 0
    assert len(list(cache.iterdir())) == 3
    ptx_alone = compiling.build_text(SOURCE, "twice.cu", {}, "compute_90")
    assert ptx_alone.ptx == built.ptx and ptx_alone.cubin_path.read_bytes() == b""


def test_the_cache_knows_everything_that_changes_the_code(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text, macro, architecture or compiler is another entry; the same again compiles nothing."""
    made = [
        compiling.build_text(SOURCE, "twice.cu", {}, "sm_90"),
        compiling.build_text(SOURCE + "\n", "twice.cu", {}, "sm_90"),
        compiling.build_text(SOURCE, "twice.cu", {"A": 1}, "sm_90"),
        compiling.build_text(SOURCE, "twice.cu", {}, "sm_80"),
    ]
    assert len({built.ptx_path for built in made}) == 4
    monkeypatch.setattr(compiling, "_by_nvrtc", None)
    monkeypatch.setattr(compiling, "by_nvcc", None)
    assert compiling.build_text(SOURCE, "twice.cu", {}, "sm_90") == made[0]
    monkeypatch.setattr(compiling, "compiler_version", lambda: "nvcc 99")
    with pytest.raises(TypeError):
        compiling.build_text(SOURCE, "twice.cu", {}, "sm_90")


def test_an_interrupted_build_is_done_again(cache: Path) -> None:
    """Files without the log, which is written last, do not count as built."""
    built = compiling.build_text(SOURCE, "twice.cu", {}, "sm_90")
    built.ptx_path.write_text("half a f")
    built.ptx_path.with_suffix(".log").unlink()
    assert ".entry twice(" in compiling.build_text(SOURCE, "twice.cu", {}, "sm_90").ptx


def test_the_compilers_complaint_is_the_error() -> None:
    """What does not compile raises with the compiler's own words and the file's name."""
    with pytest.raises(compiling.CompileError, match=r"wrong\.cu(.|\n)*oops"):
        compiling.build_text("oops;", "wrong.cu", {}, "sm_90")


def test_no_compiler_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is neither NVRTC nor nvcc, the error says what to install."""
    monkeypatch.setattr(compiling, "compiler_version", lambda: None)
    with pytest.raises(compiling.CompileError, match="pip install nvidia-cuda-nvrtc"):
        compiling.build_text(SOURCE, "twice.cu", {}, "sm_90")


@pytest.mark.skipif(compiling._nvcc_version() is None, reason="needs nvcc")
def test_nvcc_does_where_there_is_no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toolkit's compiler gives the same three things."""
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    assert (compiling.compiler_version() or "").startswith("nvcc ")
    built = compiling.build_text(SOURCE, "twice.cu", {}, "sm_90")
    assert ".entry twice(" in built.ptx and built.cubin_path.read_bytes()[:4] == b"\x7fELF"
    assert built.usage["twice"].registers > 0
    assert ".entry twice(" in compiling.build_text(SOURCE, "twice.cu", {}, "compute_90").ptx
    with pytest.raises(compiling.CompileError, match="oops"):
        compiling.build_text("oops;", "wrong.cu", {}, "sm_90")


SPECIALISATIONS = {(one.source, one.entry): one for one in [*attention("sm_90"), *others()]}


@pytest.mark.slow
@pytest.mark.skipif(compiling._nvcc_version() is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted({source for source, _ in SPECIALISATIONS}))
def test_nvcc_compiles_every_source(source: str) -> None:
    """The toolkit's compiler takes what NVRTC takes: a machine may have only one of them."""
    for (name, entry), one in SPECIALISATIONS.items():
        if name == source:
            options = [f"-D{key}={value}" for key, value in one.defines]
            ptx, _, _ = compiling.by_nvcc(compiling.expand(source), source, options, "compute_90")
            assert f".entry {entry}(".encode() in ptx


@pytest.mark.parametrize(("driver", "majors"), [(None, {12, 13}), (13, {12, 13}), (12, {12})])
def test_nvrtc_is_not_newer_than_the_driver(
    driver: int | None, majors: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver of CUDA 12 does not load what NVRTC 13 makes."""
    monkeypatch.setattr(nvrtc, "driver_major", lambda: driver)
    found = {int(name.split(".so.")[1].split(".")[0]) for name in nvrtc._candidates()}
    assert found == majors


def test_the_driver_says_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The major version of CUDA; None if there is no driver, or one that gives no answer."""
    monkeypatch.setattr(nvrtc, "_DRIVER", str(tmp_path / "libcuda.so.1"))
    assert nvrtc.driver_major() is None
    for body, major in (("*v = 12080; return 0;", 12), ("*v = 13000; return 0;", 13), ("return 3;", None)):
        library = tmp_path / f"libcuda{major}.so.1"
        source = tmp_path / "driver.c"
        source.write_text(f"int cuDriverGetVersion(int *v) {{ {body} }}")
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        monkeypatch.setattr(nvrtc, "_DRIVER", str(library))
        assert nvrtc.driver_major() == major


@pytest.mark.parametrize("with_nvrtc", [True, False])
def test_every_gpu_has_a_target(with_nvrtc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the compiler knows gets its own machine code, a newer one older PTX, an old one nothing."""
    if not with_nvrtc:
        if compiling._nvcc_version() is None:
            pytest.skip("needs nvcc")
        monkeypatch.setattr(nvrtc, "library", lambda: None)
    assert compiling.target((8, 0)) == "sm_80" and compiling.target((9, 0)) == "sm_90"
    known = compiling._architectures()
    assert compiling.target((12, 9)) == f"compute_{max(arch for arch in known if arch < 129)}"
    assert compiling.target((9, 5)) == "compute_90"
    with pytest.raises(compiling.CompileError, match=r"7\.5"):
        compiling.target((7, 5))


def test_several_processes_fill_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processes compiled is found here without compiling; what does not compile is told for its job."""
    defines = {"HIDDEN": 64, "THREADS": 32}
    jobs = [
        ("norm.cu", defines, "compute_90"),
        ("norm.cu", {"HIDDEN": "oops"}, "compute_90"),
        ("act.cu", {}, "no_arch"),
    ]
    fine, wrong, nowhere = compiling.build_all(jobs, processes=2)
    assert fine is None and "oops" in (wrong or "") and "act.cu" in (nowhere or "")
    monkeypatch.setattr(compiling, "_by_nvrtc", None)
    monkeypatch.setattr(compiling, "by_nvcc", None)
    assert ".entry rms_norm(" in compiling.build("norm.cu", defines, "compute_90").ptx


def test_includes_are_expanded_once() -> None:
    """The text that is compiled and hashed holds common.cuh itself, not its name."""
    text = compiling.expand("norm.cu")
    assert "#include" not in text and text.count("DEV float warp_sum(") == 1


def test_signatures_are_read_from_the_source() -> None:
    """Names, types, pointers and const come from the declaration; what cannot be passed is refused."""
    assert entries(SOURCE)["twice"] == (
        Parameter("x", "float", pointer=True, read_only=True),
        Parameter("y", "float", pointer=True, read_only=False),
        Parameter("n", "int", pointer=False, read_only=False),
    )
    assert [p.name for p in entries(compiling.expand("gemv.cu"))["gemv"] if p.early] == ["weight"]
    with pytest.raises(ValueError, match="double"):
        entries('extern "C" __global__ void f(double x) {}')
