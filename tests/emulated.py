"""The CUDA backend over the host emulation: csrc/cuda compiled with a C++ compiler, on CPU tensors.

It takes the whole kernel suite through the CUDA sources on a machine without a GPU.
"""

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from mtl_kernels.backends import BACKENDS
from mtl_kernels.backends.cuda import CudaBackend

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "native" / "emulation"
BUILD = ROOT / "build" / "emulated"
NAME = "emulated"


def tool(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


@functools.cache
def missing() -> str | None:
    """Builds and registers the backend, once in a process; why it cannot be had, or None."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None or ninja is None or importlib.util.find_spec("pybind11") is None:
        return "building it needs cmake, ninja and pybind11"
    if not any(map(shutil.which, (os.environ.get("CXX", "c++").split()[0], "g++", "clang++"))):
        return "no C++ compiler was found"
    BACKENDS[NAME] = CudaBackend(NAME, _module(cmake, ninja), "cpu")
    return None


def _module(cmake: str, ninja: str):  # type: ignore[no-untyped-def]
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    configure = [
        cmake, "-S", SOURCE, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    with open(BUILD / "lock", "w") as lock:  # test processes side by side build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", BUILD]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(
                    f"the emulated CUDA module does not build:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
                )
    found = next(path for path in BUILD.glob("_cuda_emulated*.so"))
    spec = importlib.util.spec_from_file_location("_cuda_emulated", found)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
