"""Compiles the CUDA emulation and the CUDA kernels with a C++ compiler, under the sanitizers, and runs their tests."""

from pathlib import Path

import pytest
from compiling import check, run, sanitizing_compiler

HERE = Path(__file__).parent
EMULATION = HERE / "emulation"
MEMORY, RACES = "address,undefined", "thread"


@pytest.fixture(scope="module", params=[MEMORY, RACES])
def emulation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[str], list[Path]]:
    """A sanitizer, the command that compiles with it, and the objects of the emulation."""
    kind = request.param
    folder = tmp_path_factory.mktemp("emulation")
    compiler = [*sanitizing_compiler(kind, folder), f"-I{EMULATION}", "-Werror"]
    objects = []
    for source in sorted(EMULATION.glob("*.cpp")):
        objects.append(folder / f"{source.stem}.o")
        check(*compiler, "-c", source, "-o", objects[-1])
    return kind, compiler, objects


# What a wrong kernel of emulation_test.cpp is stopped by; None where this sanitizer does not see it.
WRONG = {
    "exit_before_barrier": dict.fromkeys((MEMORY, RACES), "32 threads wait at __syncthreads"),
    "two_barriers": dict.fromkeys((MEMORY, RACES), "divergent barrier"),
    "divergent_shuffle": dict.fromkeys((MEMORY, RACES), "16 threads wait at __shfl_sync"),
    "partial_mask": dict.fromkeys((MEMORY, RACES), "only collectives of whole warps"),
    "half_a_warp": dict.fromkeys((MEMORY, RACES), "less than 32 threads"),
    "dynamic_overrun": {MEMORY: "heap-buffer-overflow"},
    "static_overrun": {MEMORY: "global-buffer-overflow"},
    "misaligned": {MEMORY: "misaligned address"},
    "missing_barrier": {MEMORY: "failed: reversed values", RACES: "data race"},
    "missing_warp_barrier": {RACES: "data race"},
    "missing_release": {RACES: "data race"},
    "missing_acquire": {RACES: "data race"},
    "unordered_blocks": {RACES: "data race"},
    "missing_wait": dict.fromkeys((MEMORY, RACES), "failed: values copied asynchronously"),
}


def test_emulation(emulation: tuple[str, list[str], list[Path]], tmp_path: Path) -> None:
    kind, compiler, objects = emulation
    program = tmp_path / "emulation_test"
    check(*compiler, HERE / "emulation_test.cpp", *objects, "-o", program)
    check(program)
    for case, messages in WRONG.items():
        if kind not in messages:
            continue
        done = run(program, case)
        assert done.returncode != 0, f"{case} went unnoticed"
        assert messages[kind] in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
