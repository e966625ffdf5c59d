"""Wheels, built and imported away from the source tree, with and without a compiler. Nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
IGNORED = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")

PROBE = """
import sys
# An editable install would answer for what the wheel lacks.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch, mtl_kernels, mtl_optim
print(mtl_kernels.__file__)
print(mtl_kernels.show_config())
print(mtl_optim.PCGrad()(torch.eye(2)).tolist())
"""


def run_build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds a wheel of the tree's copy into ``tmp_path``; without the CUDA module, which takes minutes."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "--verbose", "--no-build-isolation", "--no-deps"]
    return subprocess.run(
        [*command, "--wheel-dir", str(tmp_path)],
        cwd=tmp_path / "tree",
        env={**os.environ, "MTL_KERNELS_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


def build(tmp_path: Path, **environment: str) -> tuple[Path, str]:
    """The wheel, and what the build printed."""
    result = run_build(tmp_path, **environment)
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
def tree(tmp_path: Path) -> Path:
    """A copy of the tree, where there is what it takes to build it."""
    # Not by find_spec: looking for pip makes setuptools step aside in this process, which breaks later imports of it.
    installed = {one.metadata["Name"] for one in importlib.metadata.distributions()}
    missing = [name for name in ("pip", "setuptools", "pybind11") if name not in installed]
    missing += [name for name in ("cmake", "ninja") if not shutil.which(name, path=TOOLS)]
    if missing:
        pytest.skip(f"building a wheel needs {', '.join(missing)}")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=IGNORED)
    options = tmp_path / "tree" / "csrc" / "CMakeLists.txt"  # optimised code takes a minute, and is no other wheel
    options.write_text(options.read_text().replace("-O3", "-O0"))
    return tmp_path / "tree"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_wheel_with_a_compiler(tmp_path: Path) -> None:
    wheel, _ = build(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("mtl_kernels/_cpu") for name in names)
    assert {"mtl_kernels/py.typed", "mtl_optim/py.typed", "mtl_optim/demo/run.py"} <= set(names)
    assert not [name for name in names if name.split("/")[0] in ("csrc", "tests", "benchmarks", "python")]
    assert re.search("backend cpu +available", probe(wheel, tmp_path))


@pytest.mark.slow
def test_wheel_without_a_compiler(tmp_path: Path) -> None:
    wheel, printed = build(tmp_path, CXX="a-compiler-that-is-not-there")
    assert "building without compiled kernels: CXX=a-compiler-that-is-not-there was not found" in printed
    assert not any("_cpu" in Path(name).stem for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so"))
    said = probe(wheel, tmp_path)
    assert re.search("backend cpu +not available: .*install a C\\+\\+17 compiler", said)


@pytest.mark.slow
def test_a_build_that_fails_fails_the_install(tmp_path: Path, tree: Path) -> None:
    source = tree / "csrc" / "include" / "mtl_kernels" / "rows.h"  # of every file: the first one fails
    source.write_text(source.read_text() + "\nthis is not C++\n")
    result = run_build(tmp_path)
    assert result.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "error" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MTL_KERNELS_CUDA": "1", "CUDACXX": "/nowhere/nvcc"}, "CUDACXX=/nowhere/nvcc was not found"),
        ({"MTL_KERNELS_CUDA": "", "CUDACXX": "/nowhere/nvcc"}, "CUDACXX=/nowhere/nvcc was not found"),
        ({"MTL_KERNELS_CUDA": "1", "CXX": "a-compiler-that-is-not-there"}, "but nothing can be compiled"),
        ({"MTL_KERNELS_CUDA": "yes"}, "expected MTL_KERNELS_CUDA as 0 or 1, found 'yes'"),
        ({"MTL_KERNELS_CUDA_ARCHS": "sm_90"}, "expected MTL_KERNELS_CUDA_ARCHS such as '80;90;100' or 'native'"),
        ({"MTL_KERNELS_CUDA_ARCHS": "75;90"}, "expected MTL_KERNELS_CUDA_ARCHS of 80 or more, found 75"),
    ],
)
def test_what_cannot_be_built_is_said(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    result = run_build(tmp_path, **environment)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


def test_the_cuda_module_loads_without_a_driver() -> None:
    if importlib.util.find_spec("mtl_kernels._cuda") is None:
        pytest.skip("mtl_kernels._cuda was not built: there was no nvcc")
    said = subprocess.run(
        [sys.executable, "-c", "import mtl_kernels._cuda as m; print(m.architectures, m.missing())"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert any(reason in said for reason in ("no NVIDIA driver was found", "no CUDA device was found"))
