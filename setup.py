"""Builds the native modules with CMake and Ninja; pyproject.toml holds everything else.

Without a C++ compiler the install succeeds as pure Python, and ``mtl_kernels.show_config()`` says what is missing. With
one, a failing build fails the install.

Environment: MTL_KERNELS_CPU=0 leaves the compiled CPU module out, CXX names the compiler, CMAKE_BUILD_PARALLEL_LEVEL
the number of jobs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
COMPILERS = ("c++", "g++", "clang++")


def missing_toolchain() -> str | None:
    """Why nothing can be compiled here, or None."""
    if os.environ.get("MTL_KERNELS_CPU") == "0":
        return "MTL_KERNELS_CPU=0"
    named = os.environ.get("CXX")
    if named is not None and shutil.which(named.split()[0]) is None:
        return f"CXX={named} was not found"
    if named is None and not any(map(shutil.which, COMPILERS)):
        return f"no C++ compiler was found (looked for {', '.join(COMPILERS)}; CXX can name another)"
    return None


def tool(name: str) -> str:
    """A build tool from the environment that runs this build, else from PATH."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} was not found; install it with: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """One CMake build for all extension modules, each copied to where setuptools expects it."""

    def run(self) -> None:
        if (reason := missing_toolchain()) is not None:
            print(f"mtl-kernels: building without compiled kernels: {reason}", file=sys.stderr)
            # Nor with those of an earlier build, which would not be asked for.
            for extension in self.extensions:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []
            return
        try:
            import pybind11
        except ImportError:
            raise SystemExit("pybind11 was not found; install it with: pip install pybind11") from None

        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            tool("cmake"), "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build)], check=True)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            built = build / self.get_ext_filename(extension.name.rpartition(".")[2])
            target.parent.mkdir(parents=True, exist_ok=True)
            # Replaced, not overwritten: a running process may have the old file mapped.
            beside = target.with_suffix(".new")
            shutil.copyfile(built, beside)
            os.replace(beside, target)

    def get_outputs(self) -> list[str]:
        return [self.get_ext_fullpath(extension.name) for extension in self.extensions]


setup(ext_modules=[Extension("mtl_kernels._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
