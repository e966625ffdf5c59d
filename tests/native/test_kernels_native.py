"""Compiles the CPU kernels and the parallel loop without Python, under the sanitizers, and runs their C++ tests."""

import platform
from pathlib import Path

import pytest
from compiling import ROOT, check, sanitizing_compiler

CPU = ROOT / "csrc" / "cpu"
ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mf16c"],
}


@pytest.mark.parametrize(("kind", "arguments"), [("thread", []), ("address,undefined", ["fork"])])
def test_parallel_loop_under_sanitizers(kind: str, arguments: list[str], tmp_path: Path) -> None:
    program = tmp_path / "parallel_test"
    compiler = [*sanitizing_compiler(kind, tmp_path), f"-I{CPU}"]
    check(*compiler, "-Werror", Path(__file__).parent / "parallel_test.cpp", CPU / "parallel.cpp", "-o", program)
    check(program, *arguments)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    compiler = [*sanitizing_compiler("address,undefined", tmp_path), f"-I{CPU}", "-Wno-psabi"]
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects = []
    for isa, flags in ISAS.items():
        if isa != "baseline" and not on_x86:
            continue
        for name in ("gram_kernel", "combine_kernel", "elementwise_kernel", "kernels"):
            objects.append(tmp_path / f"{isa}_{name}.o")
            check(*compiler, *flags, f"-DMTL_ISA={isa}", "-O0", "-w", "-c", CPU / f"{name}.cpp", "-o", objects[-1])
    sources = [CPU / f"{name}.cpp" for name in ("gram", "combine", "elementwise", "isa", "parallel", "scratch")]
    define = ["-DMTL_X86_KERNELS"] if on_x86 else []
    program = tmp_path / "kernels_test"
    check(*compiler, *define, Path(__file__).parent / "kernels_test.cpp", *sources, *objects, "-o", program)
    check(program)
