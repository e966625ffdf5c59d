"""What nvcc made of the kernels in the built module: no spills, wide loads, tensor cores, PTX for newer GPUs."""

import pickle
import re
from pathlib import Path

import cuda_binary
import pytest
from compiling import taking_turns
from cuda_binary import Kernel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cuda_binary.missing() is not None, reason=str(cuda_binary.missing())),
]
HALVES = ("BFloat16", "Float16")
COLUMNS = ("combine_rows", "drop_rows", "trim_rows")


@pytest.fixture(scope="session")
def binary() -> Path:
    found = cuda_binary.module()
    assert found is not None
    return found


@pytest.fixture(scope="session")
def kernels(run_folder: Path, binary: Path) -> list[Kernel]:
    with taking_turns(run_folder / "binary"):
        kept = run_folder / "binary" / "kernels"
        if not kept.exists():
            kept.write_bytes(pickle.dumps(cuda_binary.read_kernels(binary)))
        found: list[Kernel] = pickle.loads(kept.read_bytes())
        return found


def failing(kernels: list[Kernel], base: str, *wanted: str) -> list[str]:
    """The kernels of that name that lack one of the instructions."""
    chosen = [kernel for kernel in kernels if kernel.base == base]
    assert chosen, f"no kernel {base}"
    return [
        f"{kernel.name} on sm_{kernel.arch}: no {instruction}"
        for kernel in chosen
        for instruction in wanted
        if kernel.count(instruction) == 0
    ]


def test_every_target_has_every_kernel(binary: Path, kernels: list[Kernel]) -> None:
    names = {kernel.name for kernel in kernels}
    targets = {kernel.arch for kernel in kernels}
    assert len(kernels) == len(names) * len(targets)
    assert {kernel.base for kernel in kernels} == {
        "gram_triangle",
        "gram_tensor",
        *COLUMNS,
        "update_states",
        "solve_batch",
    }
    built_for = re.findall(rb"\d+(?:, \d+)+", binary.read_bytes())  # the attribute `architectures`
    assert any({int(arch) for arch in text.split(b", ")} == targets for text in built_for) or len(targets) == 1


def test_newest_target_as_ptx(binary: Path, kernels: list[Kernel]) -> None:
    if not cuda_binary.ptx_targets(binary):
        pytest.skip("built for the GPUs of this machine")
    targets = {kernel.arch for kernel in kernels}
    assert cuda_binary.ptx_targets(binary) == {max(targets)} | (targets & {100})  # which those before 120 can run


def test_no_spills(kernels: list[Kernel]) -> None:
    """No kernel has local memory; the solvers that gram calls may."""
    spilling = [
        f"{kernel.name} on sm_{kernel.arch}: {kernel.registers} registers, {kernel.stack} bytes of stack, "
        f"{kernel.count('LDL')} loads and {kernel.count('STL')} stores of local memory"
        for kernel in kernels
        if (kernel.count("LDL") or kernel.count("STL") or (kernel.stack and not kernel.called))
    ]
    assert not spilling, "\n".join(spilling)


def test_gram_triangle_loads_16_bytes(kernels: list[Kernel]) -> None:
    assert failing(kernels, "gram_triangle", "LDG.E.128") == []


def test_gram_tensor_copies_16_bytes(kernels: list[Kernel]) -> None:
    assert failing(kernels, "gram_tensor", "LDGSTS.E.BYPASS.128", "LDS.128") == []


def test_gram_tensor_uses_tensor_cores(kernels: list[Kernel]) -> None:
    halves = [kernel for kernel in kernels if kernel.types[:1] and kernel.types[0] in HALVES]
    assert failing(halves, "gram_tensor", "HMMA", "DMMA") == []  # DMMA where a tile is taken again
    assert failing(kernels, "gram_tensor", "DMMA") == []


def test_float64_products_in_few_instructions(kernels: list[Kernel]) -> None:
    """sm_90 takes 16 columns of 16 rows at once, or 8 where 16 bytes hold 2 elements; no other target does."""
    on_90 = [kernel for kernel in kernels if kernel.base == "gram_tensor" and kernel.arch == 90]
    if not on_90:
        pytest.skip("not built for sm_90")
    wanted = {kernel.name: "DMMA.16x8x8" if kernel.types[0] == "double" else "DMMA.16x8x16" for kernel in on_90}
    assert [kernel.name for kernel in on_90 if kernel.count(wanted[kernel.name]) == 0] == []
    assert [kernel.name for kernel in on_90 if kernel.body["DMMA.16x8x4"]] == []


def test_gram_tensor_has_two_blocks(kernels: list[Kernel]) -> None:
    """Up to 32 tasks, and up to 64 whose rows are not of 16 bits: one block converts while the other multiplies."""
    dynamic = cuda_binary.launch_shapes()
    chosen = [
        kernel
        for kernel in kernels
        if kernel.base == "gram_tensor" and kernel.threads and kernel.arch in cuda_binary.SHARED
        if kernel.types[1] in ("1", "2") or (kernel.types[1] == "4" and kernel.types[0] not in HALVES)
    ]
    few = [
        f"{kernel.name} on sm_{kernel.arch}: {kernel.registers} registers, {kernel.stack} bytes of stack, "
        f"{kernel.shared} + {dynamic[kernel.name]} bytes of shared memory"
        for kernel in chosen
        if kernel.stack or cuda_binary.blocks_at_a_time(kernel, dynamic[kernel.name]) < 2
    ]
    assert chosen and not few, "\n".join(few)


def test_one_fence_an_arrival(kernels: list[Kernel]) -> None:
    """Blocks that meet at a counter: one fence before it, none but a look past L1 behind it."""
    for kernel in kernels:
        if kernel.base.startswith("gram"):
            counts = {name: kernel.called[name] for name in ("MEMBAR.ALL.GPU", "CCTL.IVALL", "MEMBAR.SC.GPU")}
            arrivals = kernel.called["ATOMG.E.ADD.STRONG.GPU"]
            assert arrivals > 0, kernel.name
            assert list(counts.values()) == [arrivals, arrivals, 0], f"{kernel.name} on sm_{kernel.arch}: {counts}"


def test_combine_moves_16_bytes(kernels: list[Kernel]) -> None:
    assert failing(kernels, "combine_rows", "LDG.E.128") == []
    assert failing(kernels, "drop_rows", "LDG.E.128", "STG.E.128") == []
    assert failing(kernels, "update_states", "LDG.E.128") == []
    alike = [kernel for kernel in kernels if kernel.types[:1] == kernel.types[1:2]]
    assert failing(alike, "combine_rows", "STG.E.128") == []
    assert failing(alike, "update_states", "STG.E.128") == []


@pytest.mark.parametrize("base", ["gram_triangle", "gram_tensor", *COLUMNS, "update_states"])
def test_rows_are_global_memory(kernels: list[Kernel], base: str) -> None:
    """Loads and stores whose kind of memory is only known at run time are slower."""
    generic = [
        f"{kernel.name} on sm_{kernel.arch}: {name}"
        for kernel in kernels
        for name in kernel.body
        if kernel.base == base and re.match(r"(LD|ST)\.", name)
    ]
    assert generic == []


def test_solvers_are_called_not_inlined(kernels: list[Kernel]) -> None:
    """Otherwise their registers would be those of the kernel's loop."""
    assert [kernel.name for kernel in kernels if kernel.base.startswith("gram") and not kernel.called] == []


def test_every_kernel_can_run(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        if kernel.threads:
            assert cuda_binary.blocks_at_a_time(kernel, 0) > 0, kernel.name
