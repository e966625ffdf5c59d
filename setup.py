"""Builds the native modules with CMake and Ninja; pyproject.toml holds everything else.

Without a C++ compiler the install succeeds as pure Python, and ``mtl_kernels.show_config()`` says what is missing. With
one, a failing build fails the install.

Where nvcc is found (CUDACXX, PATH, CUDA_HOME, /usr/local/cuda) the CUDA module is built too; no GPU is needed for that.

Environment: MTL_KERNELS_CUDA=0 leaves the CUDA module out, 1 insists on it; MTL_KERNELS_CUDA_ARCHS lists its
architectures ("80;90;100;120" by default, the last two from nvcc 12.8 on; "native" for the GPUs of this machine);
MTL_KERNELS_CPU=0 leaves out all that is compiled; CXX names the compiler, CMAKE_BUILD_PARALLEL_LEVEL the number of
jobs.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
COMPILERS = ("c++", "g++", "clang++")
OLDEST_ARCH = 80


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


def cuda_options() -> list[str]:
    """What CMake is told about the CUDA module."""
    wanted = os.environ.get("MTL_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"expected MTL_KERNELS_CUDA as 0 or 1, found {wanted!r}")
    compiler = os.environ.get("CUDACXX")
    if compiler is not None and wanted != "0" and shutil.which(compiler) is None:
        raise SystemExit(f"CUDACXX={compiler} was not found; name an nvcc, or leave CUDA out with MTL_KERNELS_CUDA=0")
    options = ["-DMTL_KERNELS_CUDA=" + {"": "AUTO", "0": "OFF", "1": "ON"}[wanted]]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    beside = shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in [*homes, "/usr/local/cuda"]))
    if compiler is None and shutil.which("nvcc") is None and beside is not None:
        options.append(f"-DCMAKE_CUDA_COMPILER={beside}")
    archs = os.environ.get("MTL_KERNELS_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";")
    if archs not in ("", "native"):
        if not all(arch.isdigit() for arch in archs.split(";")):
            raise SystemExit(f"expected MTL_KERNELS_CUDA_ARCHS such as '80;90;100' or 'native', found {archs!r}")
        if old := [arch for arch in archs.split(";") if int(arch) < OLDEST_ARCH]:
            raise SystemExit(f"expected MTL_KERNELS_CUDA_ARCHS of {OLDEST_ARCH} or more, found {', '.join(old)}")
    return [*options, f"-DMTL_CUDA_ARCHS={archs}"]


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
            if os.environ.get("MTL_KERNELS_CUDA") == "1":
                raise SystemExit(f"MTL_KERNELS_CUDA=1, but nothing can be compiled: {reason}")
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
            *cuda_options(),
        ]  # fmt: skip
        built = {e.name: build / self.get_ext_filename(e.name.rpartition(".")[2]) for e in self.extensions}
        for module in built.values():
            module.unlink(missing_ok=True)  # it may be of an earlier build with other options
        for command in (configure, [tool("cmake"), "--build", str(build)]):
            if (status := subprocess.run(command).returncode) != 0:
                raise SystemExit(
                    f"building the native modules failed, see above: {shlex.join(command)} ended with {status}"
                )
        for extension in list(self.extensions):
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            if extension.optional and not built[extension.name].exists():
                print(f"mtl-kernels: building without {extension.name}", file=sys.stderr)
                target.unlink(missing_ok=True)
                self.extensions.remove(extension)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # Replaced, not overwritten: a running process may have the old file mapped.
            beside = target.with_suffix(".new")
            shutil.copyfile(built[extension.name], beside)
            os.replace(beside, target)

    def get_outputs(self) -> list[str]:
        return [self.get_ext_fullpath(extension.name) for extension in self.extensions]


setup(
    license="MIT",  # here, because in pyproject.toml no one spelling suits both old and new versions of setuptools
    ext_modules=[
        Extension("mtl_kernels._cpu", sources=[]),
        Extension("mtl_kernels._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
