"""When the Triton backend can be used, and what it says where it cannot; needs no GPU."""

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import interpreter
import mtl_kernels as mk
from mtl_kernels import dispatch, uploads
from mtl_kernels.backends import BACKENDS, triton
from mtl_kernels.rows import RowTable

CUDA = torch.device("cuda", 0)
BACKEND = triton.TritonBackend()

pytestmark = pytest.mark.usefixtures("cpu_only")


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    dispatch._resolved.clear()
    triton._import_error.cache_clear()
    yield
    dispatch._resolved.clear()
    triton._import_error.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with one GPU, a compiler, and no interpreter."""
    interpreter.require_triton()
    monkeypatch.setattr(triton._kernels("common"), "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(triton.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    monkeypatch.setattr(triton.os.path, "exists", lambda path: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(BACKENDS["cuda"], "missing", lambda: "mtl_kernels._cuda was not built")


def test_there_with_a_gpu_and_a_compiler(gpu: None) -> None:
    assert BACKEND.missing() is None and BACKEND.refusal(CUDA) is None
    assert dispatch._choose(CUDA, "auto").name == "triton"


def test_without_a_compiler(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.shutil, "which", lambda name: None)
    assert "install gcc or clang, or set CC" in str(BACKEND.missing())
    assert dispatch._choose(CUDA, "auto").name == "reference"
    with pytest.raises(RuntimeError, match="'triton' is not available: triton compiles its launchers"):
        dispatch._choose(CUDA, "triton")


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_the_compilers_that_triton_finds(gpu: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(triton.shutil, "which", lambda asked: asked if asked == name else None)
    assert BACKEND.missing() is None


def test_a_compiler_of_that_name(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "mycc")
    assert "CC names 'mycc', which is not there" in str(BACKEND.missing())
    monkeypatch.setattr(triton.shutil, "which", lambda asked: asked if asked == "mycc" else None)
    assert BACKEND.missing() is None


def test_a_build_of_the_callers_own(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.import_module("triton").knobs.build, "impl", lambda *arguments: "")
    assert BACKEND.missing() is None


def test_without_pythons_headers(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.os.path, "exists", lambda path: False)
    assert "install Python's headers" in str(BACKEND.missing())


def test_the_interpreter_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.require_triton()
    monkeypatch.setattr(triton.shutil, "which", lambda name: None)
    assert BACKEND.missing() is None


@pytest.mark.parametrize(("capability", "there"), [((6, 1), False), ((7, 0), True), ((12, 0), True)])
def test_old_gpus(gpu: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dispatch._choose(CUDA, "auto").name == ("triton" if there else "reference")
    if not there:
        with pytest.raises(RuntimeError, match=r"triton needs compute capability 7\.0 or newer, this GPU has 6\.1"):
            dispatch._choose(CUDA, "triton")


def test_amd_gpus_count_otherwise(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (0, 0))
    assert BACKEND.refusal(CUDA) is None


@pytest.mark.parametrize("version", ["3.4.0", "3.2.0+git0d4682f0", "2.3.1", "3.5.0", "3.10.1", "4.0"])
def test_the_oldest_triton(gpu: None, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.import_module("triton"), "__version__", version)
    if version in ("3.5.0", "3.10.1", "4.0"):
        assert BACKEND.missing() is None
    else:
        assert f"expected triton 3.5 or newer, found {version}" in str(BACKEND.missing())
        assert dispatch._choose(CUDA, "auto").name == "reference"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise RuntimeError('0 active drivers')", "RuntimeError: 0 active drivers"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        ("jit = None", "does not load"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_triton_that_does_not_load_stops_no_other_backend(tmp_path: Path, body: str, reason: str) -> None:
    (tmp_path / "triton.py").write_text(body + "\n")
    code = """
import torch, mtl_kernels as mk
torch.cuda.is_available = lambda: True
print(mk.available_backends()["triton"])
print(mk.dispatch._choose(torch.device("cuda"), "auto").name)
try:
    mk.gram(torch.ones(2, 3), backend="triton")
except RuntimeError as error:
    print(error)
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"},
    )
    assert result.returncode == 0, result.stderr
    found, chosen, error = result.stdout.splitlines()
    assert reason in found and "the package triton does not load" in found
    assert chosen in ("cuda", "reference") and error == f"backend 'triton' is not available: {found}"


def test_a_capture_needs_a_torch_that_pins_memory_there(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.require_triton()
    tables = importlib.import_module("mtl_kernels.triton_kernels.tables")
    monkeypatch.setattr(tables, "capturing", lambda device: True)
    table, out = RowTable(torch.ones(2, 3)), torch.full((3,), 7.0)
    monkeypatch.setattr(tables, "PINS_IN_A_CAPTURE", False)
    kept = {key: len(cache) for key, cache in tables._caches.items()}
    with pytest.raises(RuntimeError, match=r"with torch 2\.11 or newer, found torch .*: use a newer one, or the comp"):
        mk.gram(table, backend="triton")
    with pytest.raises(RuntimeError, match=r"torch 2\.11 or newer"):
        mk.combine(table, torch.ones(2), out=out, backend="triton")
    assert (out == 7).all() and {key: len(cache) for key, cache in tables._caches.items()} == kept
    monkeypatch.setattr(tables, "PINS_IN_A_CAPTURE", True)
    assert torch.equal(mk.gram(table, backend="triton"), torch.full((2, 2), 3.0, dtype=torch.float64))


def test_tables_are_found_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.require_triton()
    tables = importlib.import_module("mtl_kernels.triton_kernels.tables")
    monkeypatch.setattr(uploads, "KEPT", 2)
    rows = [RowTable(torch.randn(3, 10 + n)) for n in range(5)]
    errors: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for i in range(2000):
                table = rows[(n + i) % len(rows)]
                assert tables.pointers(table).tolist() == table.pointers
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@pytest.mark.parametrize(("at", "where"), [(3, "row 1, parameter 1"), (4, "out, parameter 0")])
def test_misaligned_tensors_are_named(at: int, where: str) -> None:
    interpreter.require_triton()
    tables = importlib.import_module("mtl_kernels.triton_kernels.tables")
    table, out = RowTable([[torch.ones(2)] * 2] * 2), [torch.ones(2, dtype=torch.float64), None]
    addresses = [*table.pointers, 1024, 0]
    tables._check_aligned(uploads.packed(addresses), table, out)
    addresses[at] += 2
    with pytest.raises(ValueError, match=f"{where} lies at an address that its element size {4 if at < 4 else 8} does"):
        tables._check_aligned(uploads.packed(addresses), table, out)
