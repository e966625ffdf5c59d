"""What `make gpu` runs: its stages, how long each may take, and the tests that a sanitizer sees."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 465.0
"""For all stages together: `make gpu` ends by itself within eight minutes."""

PICKED = (
    # gram_triangle for 2, 4 and 8 rows, gram_tensor for 1, 2, 3, 4 and 8 bands of 16 rows, each in four dtypes
    "test_ragged_table_of_mixed_dtypes",
    "test_dense_rows and 3-129",
    "test_dense_rows and 9-129",
    "test_dense_rows and 17-31",
    "test_dense_rows and 33-200",
    "test_dense_rows and 64-140",
    "test_dense_rows and 128-50",
    # several slices and their ends, groups, tiles that are taken again, absent rows
    "test_parameters_that_end",
    "test_same_bits_from_run_to_run",
    "test_groups",
    "test_every_half_and_bfloat16_value",
    "test_non_finite_entries_where",
    "test_layouts",
    # combine from every dtype to every dtype, with its epilogues, in place and beside
    "test_cast_scale_and_accumulate",
    "test_in_place_over_the_tensors",
    "test_out_of_its_own",
    "test_found_inf",
    # gram with a solver behind it, and solve_batch for a warp and for a block
    "test_gram_solve",
    "test_statistics",
    "test_batched",
    "test_backends_agree and cuda-5",
    "test_backends_agree and cuda-40",
    "test_backends_agree and cuda-128",
)
"""Short tests that between them run every kernel of the cuda backend: words that a test's name and parameters hold."""

_SIDE_BY_SIDE = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Of processes that share the cores: each would start a thread for every one of them."""

_SOME_PASSED = r"\b[1-9]\d* passed"

KERNEL_NAMES = "3mtl4cuda"
"""What the mangled names of all kernels hold, and those of torch's kernels do not."""


@dataclass
class Stage:
    """One command. Stages of one ``phase`` run at the same time, those of one ``lane`` in it one after the other."""

    name: str
    command: list[str]
    """A word "{seconds}" stands for the time that it is given, less what it needs to start and to end."""
    limit: float
    """Seconds after which it is asked to end."""
    phase: int = 0
    lane: str = ""
    grace: float = 8.0
    """Seconds more after which it is ended."""
    stretches: bool = False
    """Whether it also gets what the stages before it did not use."""
    environment: dict[str, str] = field(default_factory=dict)
    skipped: str = ""
    must_print: tuple[str, ...] = ()
    """Patterns without which an exit status of 0 means nothing."""
    result: str = "not run"
    seconds: float = 0.0
    tests: str = ""
    """The last line of pytest: how many passed, failed, were skipped."""
    failed_tests: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)


def stages(out: Path, jobs: int) -> list[Stage]:
    """The build; then what measures, alone on the GPU; then the tests, whose time is set aside for them.

    What is measured is also checked where it is measured, so that no number waits for a test to be believed.
    """
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10"]
    # The first is for the host alone, the second runs with -m gpu: without CUDA tensors by default.
    elsewhere = [f"--ignore=tests/kernels/{name}.py" for name in ("test_triton_compile", "test_cuda")]
    suite = [*pytest, "tests/kernels", "--device", "cuda", "-m", "not gpu", *elsewhere]

    def junit(name: str) -> str:
        return f"--junitxml={out / f'junit-{name}.xml'}"

    def workers(share: int) -> list[str]:
        return ["-n", str(max(1, jobs // share))] if importlib.util.find_spec("xdist") else []

    return [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 104, 0,
              environment={"MTL_KERNELS_CUDA": "1", "MTL_KERNELS_CUDA_ARCHS": "native",
                           "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}),
        # Compares times, so nothing may run beside it.
        Stage("device tests", [*pytest, "tests/gpu/test_gpu_device.py", "-m", "gpu"], 30, 1,
              must_print=(_SOME_PASSED,)),
        Stage("step benchmarks", [python, "-u", "benchmarks/steps.py", "--device", "cuda", "--output", str(out)],
              47, 2),
        Stage("kernel benchmarks", [python, "-u", "benchmarks/gpu.py", "--output", str(out), "--seconds", "{seconds}"],
              130, 3, grace=20, stretches=True),
        *(Stage(name, command, 97, 4, name, environment=_SIDE_BY_SIDE,
                must_print=(_SOME_PASSED,)) for name, command in (
            ("gpu tests", [*pytest, "tests/kernels", "tests/optim", "-m", "gpu", junit("gpu"), *workers(8)]),
            ("cuda suite", [*suite, "-k", "cuda", junit("cuda"), *workers(4)]),
            ("triton suite", [*suite, "-k", "triton and not cuda", junit("triton"), *workers(4)]),
            ("other suite", [*suite, "-k", "not triton and not cuda", *workers(8)]),
        )),
        *(_sanitizer(tool, [*pytest, "-x", "tests/kernels", "--device", "cuda", "-m", "not gpu", *elsewhere,
                            "-k", f"cuda and (({') or ('.join(PICKED)}))"]) for tool in ("memcheck", "racecheck")),
    ]  # fmt: skip


def _sanitizer(tool: str, tests: list[str]) -> Stage:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    options = ["--tool", tool, "--error-exitcode", "86", "--target-processes", "application-only"]
    # Torch's kernels are not what is looked for, and Python's stack is deep.
    options += ["--kernel-name", f"kns={KERNEL_NAMES}", "--num-callers-host", "8"]
    options += ["--launch-timeout", "120"]  # the tests start late, after torch was imported
    command = [program or "compute-sanitizer", *options, *tests]
    stage = Stage(tool, command, 97, 4, tool, environment=dict(_SIDE_BY_SIDE))
    if tool == "memcheck":
        # Errors of calls that torch tries and catches are its own.
        stage.command[1:1] = ["--report-api-errors", "no"]
        # Memory that torch's allocator keeps hides accesses beyond the end of a tensor.
        stage.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    stage.skipped = "" if program else "compute-sanitizer is not installed"
    clean = r"ERROR SUMMARY: 0 errors" if tool == "memcheck" else r"RACECHECK SUMMARY: 0 hazards"
    stage.must_print = (clean, _SOME_PASSED)
    return stage


def seconds_of(found: list[Stage]) -> float:
    """The most that stages of one phase take."""
    lanes: dict[str, float] = {}
    for stage in found:
        lanes[stage.lane] = lanes.get(stage.lane, 0.0) + stage.limit + stage.grace
    return max(lanes.values(), default=0.0)
