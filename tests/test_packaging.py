"""Wheels, built and imported away from the source tree, with and without a compiler. Nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IGNORED = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")

PROBE = """
import torch, mtl_kernels, mtl_optim
print(mtl_kernels.__file__)
print(mtl_kernels.show_config())
print(mtl_optim.PCGrad()(torch.eye(2)).tolist())
"""


def build(tmp_path: Path, **environment: str) -> tuple[Path, str]:
    """A wheel of a copy of the tree, and what the build printed."""
    shutil.copytree(ROOT, tmp_path / "tree", ignore=IGNORED)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
    ]
    result = subprocess.run(
        command, cwd=tmp_path / "tree", env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    return wheel, result.stdout + result.stderr


def probe(wheel: Path, tmp_path: Path) -> str:
    """What the installed package says of itself, asked from a folder where the source tree cannot shadow it."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run([sys.executable, "-c", PROBE], cwd="/", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(site))
    assert result.stdout.endswith("[1.0, 1.0]\n")
    return result.stdout


@pytest.fixture(autouse=True)
def build_tools() -> None:
    for module in ("pip", "setuptools", "pybind11"):
        pytest.importorskip(module, reason=f"{module} is needed to build a wheel")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")


@pytest.mark.slow
def test_wheel_with_a_compiler(tmp_path: Path) -> None:
    wheel, _ = build(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("mtl_kernels/_cpu") for name in names)
    assert {"mtl_kernels/py.typed", "mtl_optim/py.typed", "mtl_optim/demo/run.py"} <= set(names)
    assert not [name for name in names if name.split("/")[0] in ("csrc", "tests", "benchmarks", "python")]
    assert "backend cpu        available" in probe(wheel, tmp_path)


@pytest.mark.slow
def test_wheel_without_a_compiler(tmp_path: Path) -> None:
    wheel, printed = build(tmp_path, CXX="a-compiler-that-is-not-there")
    assert "building without compiled kernels: CXX=a-compiler-that-is-not-there was not found" in printed
    assert not any("_cpu" in Path(name).stem for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so"))
    said = probe(wheel, tmp_path)
    assert "backend cpu        not available" in said and "install a C++17 compiler" in said


@pytest.mark.slow
def test_a_build_that_fails_fails_the_install(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "tree", ignore=IGNORED)
    source = tmp_path / "tree" / "csrc" / "cpu" / "parallel.cpp"
    source.write_text(source.read_text() + "\nthis is not C++\n")
    result = run_build(tmp_path, {})
    assert result.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "error" in result.stdout + result.stderr
