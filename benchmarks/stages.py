"""What `make gpu` runs: its stages, and how long each may take."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .picks import PICKED, SHARED, expression

SECONDS = 465.0
"""For all stages together: `make gpu` ends by itself within eight minutes."""

_SIDE_BY_SIDE = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Of processes that share the cores: each would start a thread for every one of them."""

# The first is for the host alone, the second runs with -m gpu: without CUDA tensors by default.
_EVERY = ("tests/kernels", *(f"--ignore=tests/kernels/{name}.py" for name in ("test_triton_compile", "test_cuda")))
_SOME = ("tests/kernels/test_rows.py",)

_NETWORKS = ("perceptron, 32", "convolutional", "recommender", "encoder, 16 x 64")
"""Those of `benchmarks/networks.py` that steps are measured on, the quickest first."""

SUITE = "benchmarks/suite.py"

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
    grace: float = 5.0
    """Seconds more after which it is ended."""
    stretches: bool = False
    """Whether it also gets what the stages before it did not use."""
    doubt: str = ""
    """What to think of the results of the others when it fails."""
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


class Plan:
    """Stages for a folder of results and a number of processes; ``device`` "cpu" tries them out without a GPU.

    On a CPU the backend of the CPU stands for that of the GPU, in few tests and small sizes: what is tried is how the
    stages work together.
    """

    def __init__(self, out: Path, scratch: Path, jobs: int, device: str = "cuda") -> None:
        self.out, self.scratch, self.jobs, self.device = out, scratch, jobs, device
        self.on_gpu = device == "cuda"
        self._needs_gpu = "" if self.on_gpu else "a dry run has no GPU"

    def stages(self) -> list[Stage]:
        """The build beside what needs none; first tests; what measures, alone on the GPU; all tests; the sanitizers.

        What is measured is also checked where it is measured; the first tests see more cases than are measured.
        """
        python = [sys.executable, "-u"]
        ours = "cuda" if self.on_gpu else "cpu or baseline"
        first = expression(f"triton or {ours}", PICKED) if self.on_gpu else expression(ours, PICKED[:2])
        where = ["--device", self.device, "--output", str(self.out)]
        steps = [] if self.on_gpu else ["--quick", "--tasks", "2"]
        passes = ["--quick", "--tasks", "8", "40", "--networks", *_NETWORKS]
        if not self.on_gpu:
            passes = ["--quick", "--tasks", "2", "--networks", _NETWORKS[0], "--no-memory"]
        kernels = [] if self.on_gpu else ["--tasks", "2", "--max-elements", "2e4", "--repeats", "1"]
        device_tests = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_gpu_device.py", "-m",
                        "gpu", f"--junitxml={self.scratch / 'device.xml'}"]  # fmt: skip
        return [
            # The CPU module first: solvers without a kernel in Triton run there.
            self._build("cpu build", "0", 25, 0),
            self._build("build", "1", 100, 1, self._needs_gpu),
            self._tests("triton suite", self._kernels("triton and not cuda"), 2, 97, 1),
            self._tests("first tests", self._kernels(first, *_EVERY), 2, 35, 2,
                        doubt="the first tests did not pass, so do not go by the times below"),
            # Compares times, so nothing may run beside it.
            Stage("device tests", device_tests, 25, 3, must_print=(_SOME_PASSED,), skipped=self._needs_gpu),
            Stage("step benchmarks", [*python, "benchmarks/steps.py", *where, *steps], 45, 4),
            Stage("pass benchmarks", [*python, "benchmarks/passes.py", *where, *passes, "--seconds", "{seconds}"],
                  40, 5),
            Stage("kernel benchmarks", [*python, "benchmarks/gpu.py", *where, *kernels, "--seconds", "{seconds}"],
                  30, 6, grace=15, stretches=True),
            self._tests("cuda suite", self._kernels(ours), 2, 55, 7),
            self._tests("other suite", self._kernels(f"not triton and not ({ours})"), 3, 55, 7),
            self._tests("gpu tests", ["tests/kernels", "tests/optim", "-m", "gpu"], 8, 55, 7, skipped=self._needs_gpu),
            self._sanitizer("memcheck", PICKED, 4),
            self._sanitizer("racecheck", SHARED, 2),
        ]  # fmt: skip

    def _build(self, name: str, cuda: str, limit: float, phase: int, skipped: str = "") -> Stage:
        environment = {"MTL_KERNELS_CUDA": cuda, "MTL_KERNELS_CUDA_ARCHS": "native"}
        environment["CMAKE_BUILD_PARALLEL_LEVEL"] = str(self.jobs)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return Stage(name, command, limit, phase, name, grace=2, environment=environment, skipped=skipped)

    def _kernels(self, which: str, *files: str) -> list[str]:
        """Pytest's arguments for tests of the kernels; in a dry run those of one file unless it is said which."""
        files = files or (_EVERY if self.on_gpu else _SOME)
        return [*files, "--device", self.device, "-m", "not gpu", "-k", which]

    def _tests(
        self, name: str, tests: list[str], share: int, limit: float, phase: int, doubt: str = "", skipped: str = "",
        under: Sequence[str] = (), must_print: str = "", each: float = 40.0,
    ) -> Stage:  # fmt: skip
        """Tests in a share of the processes."""
        junit = self.scratch / f"{name.replace(' ', '-')}.xml"
        options = ["--jobs", str(max(1, self.jobs // share)), "--junit", str(junit), "--each", f"{each:.0f}"]
        options += ["--under", shlex.join(under), "--must-print", must_print] if under else []
        command = [sys.executable, "-u", SUITE, name, *options, "--", *tests]
        return Stage(name, command, limit, phase, name, doubt=doubt, environment=dict(_SIDE_BY_SIDE), skipped=skipped,
                     must_print=(_SOME_PASSED,))  # fmt: skip

    def _sanitizer(self, tool: str, picks: tuple[str, ...], share: int) -> Stage:
        program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        command += ["--target-processes", "application-only"]
        # Torch's kernels are not what is looked for, and Python's stack is deep.
        command += ["--kernel-name", f"kns={KERNEL_NAMES}", "--num-callers-host", "8"]
        command += ["--launch-timeout", "120"]  # the tests start late, after torch was imported
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # of calls that torch tries and catches
        clean = r"ERROR SUMMARY: 0 errors" if tool == "memcheck" else r"RACECHECK SUMMARY: 0 hazards"
        skipped = self._needs_gpu or ("" if program else "compute-sanitizer is not installed")
        stage = self._tests(tool, self._kernels(expression("cuda", picks)), share, 60, 8, skipped=skipped,
                            under=command, must_print=clean, each=60.0)  # fmt: skip
        stage.stretches = True
        if tool == "memcheck":
            # Memory that torch's allocator keeps hides accesses beyond the end of a tensor.
            stage.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        return stage


def seconds_of(found: list[Stage]) -> float:
    """The most that stages of one phase take."""
    lanes: dict[str, float] = {}
    for stage in found:
        lanes[stage.lane] = lanes.get(stage.lane, 0.0) + stage.limit + stage.grace
    return max(lanes.values(), default=0.0)
