"""Compiles solvers_test.cpp against the solver headers alone, under the sanitizers, and runs it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_solvers_under_sanitizers(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) on the path")
    program = tmp_path / "solvers_test"
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fno-sanitize-recover=all",
        "-pthread",
    ]
    probe = subprocess.run(
        [compiler, "-fsanitize=address,undefined", "-x", "c++", "-", "-o", tmp_path / "probe"],
        input="int main() {}",
        text=True,
        capture_output=True,
    )
    if probe.returncode != 0:
        pytest.skip(f"{compiler} links no sanitizers: {probe.stderr.strip()[-200:]}")
    source = ROOT / "tests" / "native" / "solvers_test.cpp"
    include = ROOT / "csrc" / "include"
    subprocess.run(
        [compiler, *flags, "-fsanitize=address,undefined", f"-I{include}", source, "-o", program], check=True
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
