"""Imports run one way: csrc <- mtl_kernels <- mtl_optim <- benchmarks."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "mtl_kernels": ("torch.nn", "torch.optim", "mtl_optim", "benchmarks", "tests"),
    "python/mtl_optim": ("benchmarks", "tests", "mtl_kernels._cpu", "mtl_kernels.backends"),
    "benchmarks": ("tests",),
}
KERNEL_HEADERS = {"kernels.h", "simd.h", "cstddef", "cstdint", "immintrin.h", "mtl_kernels/rows.h"}
INLINED_HEADERS = {"mtl_kernels/elementwise.h", "mtl_kernels/philox.h", "mtl_kernels/qualifiers.h"}


def sources(folder: str, *suffixes: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes and "build" not in path.parts)


def imported(path: Path, package: str) -> set[str]:
    """Every module a file imports, and every name it takes from one, as full dotted names."""
    here = [*package.split("/")[-1:], *path.relative_to(ROOT / package).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def file_graph(package: str) -> dict[str, set[str]]:
    """The files of a package by their dotted names, each with those that it imports, wherever in it."""
    folder, name = ROOT / package, package.rpartition("/")[2]
    files = {
        ".".join([name, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in sources(package, ".py")
    }
    graph = {}
    for module, path in files.items():
        found = imported(path, package) & files.keys()
        # `from . import name` takes the file of that name, and names its package on the way.
        graph[module] = {base for base in found if not any(within(other, base) and other != base for other in found)}
    return graph


def attributes(path: Path) -> set[str]:
    """Every dotted name that a file uses, such as torch.nn.Module."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", FORBIDDEN)
def test_python_imports_run_one_way(package: str) -> None:
    files = sources(package, ".py")
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(imported(path, package))
        for forbidden in FORBIDDEN[package]
        if within(name, forbidden)
    ]
    assert not found and (files or package == "benchmarks")


@pytest.mark.parametrize("package", ["mtl_kernels", "python/mtl_optim"])
def test_no_files_import_each_other_in_a_ring(package: str) -> None:
    graph = file_graph(package)
    assert len(graph) > 10 and sum(map(len, graph.values())) > 10
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_the_kernel_layer_uses_no_modules_or_optimizers() -> None:
    found = [
        f"{path.relative_to(ROOT)} uses {name}"
        for path in sources("mtl_kernels", ".py")
        for name in sorted(attributes(path))
        if within(name, "torch.nn") or within(name, "torch.optim")
    ]
    assert not found


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_native_code_knows_no_framework() -> None:
    files = sources("csrc", ".h", ".hpp", ".cpp", ".cu", ".cuh")
    assert files
    for path in files:
        for header in includes(path):
            assert not re.match(r"(torch|ATen|c10|caffe2)/", header), f"{path.name} includes {header}"
            if "bindings" not in path.name:
                assert not re.match(r"(pybind11/|Python\.h)", header), f"{path.name} includes {header}"


def test_code_compiled_for_one_instruction_set_includes_nothing_that_is_shared() -> None:
    """An inline function of a shared header, compiled with AVX-512, could be the copy the linker keeps."""
    files = [path for path in sources("csrc/cpu", ".cpp", ".h") if "MTL_ISA" in path.read_text()]
    assert {path.name for path in files} >= {"simd.h", "gram_kernel.cpp", "combine_kernel.cpp"}
    for path in files:
        extra = set(includes(path)) - KERNEL_HEADERS - INLINED_HEADERS
        assert not extra, f"{path.name} includes {sorted(extra)}"
    for name in INLINED_HEADERS - {"mtl_kernels/qualifiers.h"}:
        path = ROOT / "csrc/include" / name
        assert set(includes(path)) <= {"cstdint", *INLINED_HEADERS} and "MTL_HD " not in path.read_text(), name
    shared = set(includes(ROOT / "csrc/include/mtl_kernels/rows.h"))
    assert shared <= {"cstddef", "cstdint"}, f"rows.h includes {sorted(shared)}"


def test_headers_for_device_code_use_no_containers() -> None:
    solvers = [path for path in sources("csrc/include/mtl_kernels/solvers", ".h") if path.name != "find.h"]
    shared = [path for path in (ROOT / "csrc/include/mtl_kernels").glob("*.h") if path.name != "chunks.h"]
    for path in [*solvers, *shared]:
        bad = set(includes(path)) & {
            "vector",
            "string",
            "memory",
            "algorithm",
            "map",
            "functional",
            "stdexcept",
            "iostream",
        }
        assert not bad, f"{path.name} includes {sorted(bad)}"


def test_packages_are_all_listed() -> None:
    listed = set(re.findall(r'"(mtl_(?:kernels|optim)[\w.]*)"', (ROOT / "pyproject.toml").read_text()))
    for folder, parent in (("mtl_kernels", ROOT), ("mtl_optim", ROOT / "python")):
        for init in (parent / folder).rglob("__init__.py"):
            name = ".".join(init.parent.relative_to(parent).parts)
            assert name in listed, f"pyproject.toml does not list the package {name}"
