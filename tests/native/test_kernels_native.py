"""Compiles the CPU kernels and the parallel loop without Python, under the sanitizers, and runs their C++ tests."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread", f"-I{CPU}", f"-I{ROOT / 'csrc' / 'include'}"]
ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mf16c"],
}


def sanitizing_compiler(kind: str, folder: Path) -> list[str]:
    """A compiler with the flags of a sanitizer under which programs build and start here."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) on the path")
    command = [*compiler.split(), *FLAGS, f"-fsanitize={kind}", "-fno-sanitize-recover=all"]
    probe = folder / "probe"
    built = subprocess.run(
        [*command, "-x", "c++", "-", "-o", probe], input="int main() {}", text=True, capture_output=True
    )
    if built.returncode != 0 or subprocess.run([probe], capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} has no working -fsanitize={kind}: {built.stderr.strip()[-200:]}")
    return command


def check(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize(("kind", "arguments"), [("thread", []), ("address,undefined", ["fork"])])
def test_parallel_loop_under_sanitizers(kind: str, arguments: list[str], tmp_path: Path) -> None:
    program = tmp_path / "parallel_test"
    compiler = sanitizing_compiler(kind, tmp_path)
    check(*compiler, "-Werror", Path(__file__).parent / "parallel_test.cpp", CPU / "parallel.cpp", "-o", program)
    check(program, *arguments)


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    compiler = [*sanitizing_compiler("address,undefined", tmp_path), "-Wno-psabi"]
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects = []
    for isa, flags in ISAS.items():
        if isa != "baseline" and not on_x86:
            continue
        for name in ("gram_kernel", "combine_kernel", "kernels"):
            objects.append(tmp_path / f"{isa}_{name}.o")
            check(*compiler, *flags, f"-DMTL_ISA={isa}", "-O0", "-w", "-c", CPU / f"{name}.cpp", "-o", objects[-1])
    sources = [CPU / f"{name}.cpp" for name in ("gram", "combine", "isa", "parallel")]
    define = ["-DMTL_X86_KERNELS"] if on_x86 else []
    program = tmp_path / "kernels_test"
    check(*compiler, *define, Path(__file__).parent / "kernels_test.cpp", *sources, *objects, "-o", program)
    check(program)
