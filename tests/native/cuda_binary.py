"""What the compiler made of the CUDA kernels: registers, memory and instructions of each, read from the built module.

``python -m tests.native.cuda_binary [module]`` prints the table, with the occupancy of each kernel on each target.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Registers and bytes of shared memory of a multiprocessor.
_REGISTERS = 64 << 10
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
_RESERVED = 1 << 10  # of a block's shared memory, by the system; from sm_90 on the compiler counts it in


@dataclass
class Kernel:
    """One kernel for one target."""

    name: str
    """Without namespaces and parameters: ``gram_tensor<float, 4>``."""
    arch: int
    registers: int
    stack: int
    shared: int
    """Bytes, those whose size a launch names left out."""
    threads: int
    """Per block; 0 where the module has no PTX to tell."""
    body: Counter[str] = field(default_factory=Counter)
    """How often each instruction that moves or orders memory or multiplies matrices stands in the kernel, the functions
    that it calls left out."""
    called: Counter[str] = field(default_factory=Counter)
    """The same for those functions: the solvers and what else follows gram."""

    @property
    def base(self) -> str:
        return self.name.split("<")[0]

    @property
    def types(self) -> list[str]:
        return self.name.rstrip(">").split("<")[1].split(", ") if "<" in self.name else []

    def count(self, instruction: str) -> int:
        """Instructions of the body that begin so."""
        return sum(number for name, number in self.body.items() if name.startswith(instruction))


def missing() -> str | None:
    """Why there is nothing to read, or None."""
    if module() is None:
        return "mtl_kernels._cuda was not built"
    if tool("cuobjdump") is None or tool("nvdisasm") is None:
        return "no cuobjdump and nvdisasm: neither on the PATH, nor in a CUDA toolkit, nor with Triton"
    return None


def module() -> Path | None:
    return next((ROOT / "mtl_kernels").glob("_cuda*.so"), None)


@cache
def tool(name: str) -> str | None:
    folders = [*Path("/usr/local").glob("cuda*/bin")]
    triton = find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        folders.append(Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin")
    found = (shutil.which(name, path=path) for path in (None, *map(str, folders)))
    return next((path for path in found if path is not None), None)


def _output(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stderr[-2000:]}")
    return done.stdout


@cache
def _demangled(symbol: str) -> str:
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_char_p
    text = library.__cxa_demangle(symbol.encode(), None, None, None)
    return symbol if text is None else text.decode()


def _short(demangled: str) -> str:
    """``gram_tensor<Float16, 8>`` of ``void mtl::cuda::(...)::gram_tensor<mtl::cuda::Float16, 8>(...)``."""
    found = re.search(r"(\w+)(?:\[abi:\w+\])?(<[^()]*>)?\(mtl::", demangled)
    assert found is not None, demangled
    return found[1] + re.sub(r"\w+::", "", found[2] or "")


def ptx_targets(binary: Path) -> set[int]:
    """The architectures of the PTX in it, which newer GPUs compile for themselves."""
    listing = _output(tool("cuobjdump"), "--list-ptx", binary)
    return {int(arch) for arch in re.findall(r"sm_(\d+)\w*\.ptx", listing)}


def read_kernels(binary: Path) -> list[Kernel]:
    """Every kernel of every architecture. Takes half a minute, most of it in the disassembler."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        for kind in ("-xelf", "-xptx"):
            _output(tool("cuobjdump"), kind, "all", binary.resolve(), cwd=at)
        threads = {}
        for ptx in at.glob("*.ptx"):
            for symbol, size in re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", ptx.read_text()):
                threads[_kernel_of(symbol)] = int(size)
        cubins = sorted(at.glob("*.cubin"), key=lambda path: -path.stat().st_size)
        with ThreadPoolExecutor() as pool:
            found = [kernel for kernels in pool.map(lambda path: _read(path, threads), cubins) for kernel in kernels]
    return sorted(found, key=lambda kernel: (kernel.arch, kernel.name))


def _kernel_of(symbol: str) -> str:
    return _short(_demangled(symbol))


def _read(cubin: Path, threads: dict[str, int]) -> list[Kernel]:
    arch = int(re.findall(r"sm_(\d+)", cubin.name)[0])
    kernels: dict[str, Kernel] = {}
    usage = _output(tool("cuobjdump"), "--dump-resource-usage", cubin)
    for symbol, registers, stack, shared in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        name = _kernel_of(symbol)
        own = int(shared) - (_RESERVED if arch >= 90 else 0)
        kernels[symbol] = Kernel(name, arch, int(registers), int(stack), own, threads.get(name, 0))
    for section in re.split(r"^\.text\.", _output(tool("nvdisasm"), "-c", cubin), flags=re.MULTILINE)[1:]:
        kernel = kernels.get(section[: section.index(":")])
        if kernel is None:
            continue
        # The labels of called functions begin with a dollar.
        body, *called = re.split(r"^\$", section, flags=re.MULTILINE)
        kernel.body.update(_instructions(body))
        for function in called:
            kernel.called.update(_instructions(function))
    return list(kernels.values())


def _instructions(code: str) -> list[str]:
    return re.findall(r"\*/.* ((?:LD|ST|HMMA|DMMA|MEMBAR|ATOM|CCTL)[\w.]*) .*;$", code, flags=re.MULTILINE)


def blocks_at_a_time(kernel: Kernel, dynamic_shared: int) -> int:
    """How many blocks a multiprocessor holds."""
    warps = kernel.threads // 32
    if warps == 0:
        return 0
    registers = -(-kernel.registers * 32 // 256) * 256  # of a warp
    by_registers = _REGISTERS // registers // 4 * 4 // warps  # a quarter of the multiprocessor each
    by_shared = SHARED.get(kernel.arch, 100 << 10) // (kernel.shared + dynamic_shared + _RESERVED)
    return min(by_registers, by_shared, 64 // warps, 32)


def launch_shapes() -> dict[str, int]:
    """Dynamic shared memory of every gram kernel: what csrc/cuda says, compiled for the host."""
    emulation, cuda = ROOT / "tests" / "native" / "emulation", ROOT / "csrc" / "cuda"
    program = r"""
        #include <cstdio>
        #include "gram_kernels.h"
        #include "shared_memory.h"
        int main() {
          for (int dtype = 0; dtype < 4; ++dtype) {
            for (int K = 1; K <= mtl::kMaxTasks; ++K) {
              for (bool slow_double : {false, true}) {
                const auto kernel = mtl::cuda::gram_kernel(static_cast<mtl::DType>(dtype), K, slow_double);
                const auto& symbols = emulation::symbols_of(reinterpret_cast<const void*>(kernel.run));
                std::printf("%zu %s\n", kernel.shared_bytes, symbols.name.c_str());
              }
            }
          }
        }"""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "shapes.cpp"
        source.write_text(program)
        sources = [source, *cuda.glob("gram_t*.cu"), *emulation.glob("*.cpp")]
        command = ["g++", "-std=c++17", "-w", "-pthread", "-DMTL_EMULATION", "-x", "c++"]
        command += [f"-I{path}" for path in (cuda, ROOT / "csrc" / "include", emulation)]
        subprocess.run([*command, *sources, "-o", source.with_suffix("")], check=True)
        output = subprocess.run([source.with_suffix("")], check=True, capture_output=True, text=True).stdout
    return {_short(name): int(size) for size, name in (line.split(" ", 1) for line in output.splitlines())}


def _widest(kernel: Kernel) -> str:
    """Bytes of its widest load from global memory."""
    loads = [name for name in kernel.body if re.match(r"LDG(STS)?\.", name)]
    width = max((int(bits) // 8 for name in loads for bits in re.findall(r"\.(64|128)\b", name)), default=4)
    return f"{width}{' (asynchronous)' if any(name.startswith('LDGSTS') for name in loads) else ''}"


def _joined(values: list[object]) -> str:
    """One value for each target, or the only one."""
    return str(values[0]) if len({*map(str, values)}) == 1 else " / ".join(map(str, values))


def table(kernels: list[Kernel], dynamic: dict[str, int]) -> str:
    """Markdown, a row for each kernel."""
    targets = sorted({kernel.arch for kernel in kernels})
    lines = [
        f"Where targets differ: {' / '.join(f'sm_{arch}' for arch in targets)}. Shared bytes: static + dynamic. "
        "Blocks and warps: at a time on a multiprocessor, which has room for 64 warps.",
        "",
        "| kernel | threads | registers | stack bytes | shared bytes | blocks | warps | bytes per load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted({kernel.name for kernel in kernels}):
        alike = [kernel for kernel in kernels if kernel.name == name]
        size = dynamic.get(name, 0)
        blocks = [blocks_at_a_time(kernel, size) for kernel in alike]
        cells = [
            [kernel.threads for kernel in alike],
            [kernel.registers for kernel in alike],
            [kernel.stack for kernel in alike],
            [f"{kernel.shared} + {size}" for kernel in alike],
            blocks,
            [count * kernel.threads // 32 for count, kernel in zip(blocks, alike, strict=True)],
            [_widest(kernel) for kernel in alike],
        ]
        lines.append(f"| `{name}` | {' | '.join(_joined([*cell]) for cell in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else module()
    if path is None:
        sys.exit(missing())
    print(table(read_kernels(path), launch_shapes()))
