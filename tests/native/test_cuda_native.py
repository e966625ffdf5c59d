"""Compiles the CUDA emulation and the CUDA kernels with a C++ compiler, under the sanitizers, and runs their tests."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compiling import ROOT, check, run, sanitizing_compiler, taking_turns

HERE = Path(__file__).parent
EMULATION = HERE / "emulation"
CUDA = ROOT / "csrc" / "cuda"
MEMORY, RACES = "address,undefined", "thread"
# The kernels take minutes to compile with more than this; the emulation is always tried under both others.
KINDS = ["address", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in (MEMORY, RACES))]


@pytest.fixture(params=[MEMORY, RACES])
def kind(request: pytest.FixtureRequest) -> str:
    """A sanitizer."""
    return str(request.param)


def program(run_folder: Path, kind: str, name: str, sources: list[Path]) -> Path:
    """The program of these sources and the emulation."""
    folder = run_folder / kind.replace(",", "-")
    with taking_turns(folder):
        found = folder / name
        if found.exists():
            return found
        compiler = [*sanitizing_compiler(kind, folder), f"-I{EMULATION}", f"-I{CUDA}", "-Werror"]
        compiler += ["-DMTL_EMULATION", "-Wno-unknown-pragmas"]

        def compiled(source: Path) -> Path:
            made = folder / f"{source.name}.o"
            if not made.exists():
                check(*compiler, "-x", "c++", "-c", source, "-o", made)
            return made

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, [*sources, *sorted(EMULATION.glob("*.cpp"))]))
        partial = folder / f"{name}.partial"
        check(*compiler, *objects, "-o", partial)
        return partial.rename(found)


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


def test_emulation(run_folder: Path, kind: str) -> None:
    built = program(run_folder, kind, "emulation_test", [HERE / "emulation_test.cpp"])
    check(built)
    for case, messages in WRONG.items():
        if kind not in messages:
            continue
        done = run(built, case)
        assert done.returncode != 0, f"{case} went unnoticed"
        assert messages[kind] in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-2000:]


# Arguments of cuda_test; those of a line take a few seconds together. float16 goes the way of bfloat16, but for loads.
CASES = [
    "plan errors gram_mixed combine_mixed",
    "gram_float32",
    "gram_slow_double range_slow_double",
    "gram_float64",
    "gram_bfloat16",
    pytest.param("gram_float16", marks=pytest.mark.exhaustive),
    "range_float32 range_float64",
    pytest.param("range_bfloat16", marks=pytest.mark.exhaustive),
    pytest.param("range_float16", marks=pytest.mark.exhaustive),
    "gram_solver",
    "combine_float32 combine_float64 combine_bfloat16 combine_float16",
    pytest.param("combine_slow_double rounding", marks=pytest.mark.exhaustive),
    "columns_float32 columns_float64",
    pytest.param("columns_bfloat16 columns_float16", marks=pytest.mark.exhaustive),
    "states_float32 states_float64 states_bfloat16 states_float16",
    "solve",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, indirect=True)
@pytest.mark.parametrize("cases", CASES)
def test_kernels(run_folder: Path, kind: str, cases: str) -> None:
    host = [source for source in CUDA.glob("*.cpp") if source.name != "bindings.cpp"]
    sources = [*CUDA.glob("gram_t*.cu"), *CUDA.glob("*.cu"), *host, *HERE.glob("cuda_*test.cpp")]
    check(program(run_folder, kind, "cuda_test", list(dict.fromkeys(sources))), *cases.split())
