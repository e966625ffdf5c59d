"""Builds, tests and measures on a GPU, stage by stage, and leaves one folder with the results: ``make gpu OUT=dir``.

Every stage has a time limit of its own and all of them share one; a stage that fails or is late is recorded and the
others go on. Its output goes to the terminal and to gpu.log line by line, and summary.md is written anew after every
stage, so that whatever ends the run loses nothing. The status is that of the worst stage.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import functools
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PICKED = (
    "cuda and (test_ragged_table_of_mixed_dtypes or test_parameters_that_end or test_groups or test_out_of_its_own"
    " or test_in_place_over_the_tensors or test_layouts or test_same_bits_from_run_to_run or test_batched"
    " or test_gram_solve or test_statistics)"
)
"""Short tests that between them run every kernel of the cuda backend, for the sanitizer."""

_GRACE = 8.0
_TAIL = 40


@dataclass
class Stage:
    """One command. Stages of one ``phase`` run at the same time, those of one ``lane`` in it one after the other."""

    name: str
    command: list[str]
    limit: float
    phase: int = 0
    lane: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    skipped: str = ""
    must_print: str = ""
    """A pattern without which an exit status of 0 means nothing."""
    result: str = "not run"
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)


def stages(out: Path, jobs: int) -> list[Stage]:
    """What `make gpu` runs."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10"]
    parallel = ["-n", str(max(1, jobs // 2))] if importlib.util.find_spec("xdist") else []
    junit = {name: f"--junitxml={out / f'junit-{name}.xml'}" for name in ("gpu", "kernels")}
    bench = [python, "-u", "benchmarks/gpu.py", "--output", str(out)]
    steps = [python, "-u", "benchmarks/steps.py", "--device", "cuda", "--output", str(out)]
    found = [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 240, 0,
              environment={"MTL_KERNELS_CUDA_ARCHS": "native", "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}),
        Stage("gpu tests", [*pytest, "-m", "gpu", junit["gpu"], *parallel], 200, 1, "tests"),
        Stage("kernel suite", [*pytest, "tests/kernels", "--device", "cuda", "-m", "not gpu", junit["kernels"],
                               *parallel], 240, 1, "kernels"),
        *(_sanitizer(tool, [*pytest, "-x", "tests/kernels", "--device", "cuda", "-m", "not gpu", "-k", PICKED])
          for tool in ("memcheck", "racecheck")),
        Stage("kernel benchmarks", bench, 230, 2, "benchmarks"),
        Stage("step benchmarks", steps, 90, 2, "benchmarks"),
    ]  # fmt: skip
    return found


def _sanitizer(tool: str, tests: list[str]) -> Stage:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    options = ["--tool", tool, "--error-exitcode", "86", "--target-processes", "application-only"]
    # The tests start late, after torch was imported; and errors of calls that torch tries and catches are its own.
    options += ["--launch-timeout", "120", "--report-api-errors", "no"]
    stage = Stage(tool, [program or "compute-sanitizer", *options, *tests], 110, 1, "sanitizer")
    # Memory that torch's allocator keeps hides accesses beyond the end of a tensor.
    stage.environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    stage.skipped = "" if program else "compute-sanitizer is not installed"
    stage.must_print = r"ERROR SUMMARY: 0 errors" if tool == "memcheck" else r"RACECHECK SUMMARY: 0 hazards"
    return stage


class Log:
    """Lines of all stages, marked with the stage, in a file and on the terminal."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)
        self._lock = threading.Lock()

    def write(self, name: str, text: str) -> None:
        with self._lock:
            line = f"[{name}] {text}"
            print(line, flush=True)
            self._file.write(line + "\n")

    def close(self) -> None:
        self._file.close()


_running: set[subprocess.Popen[str]] = set()
_stopped = threading.Event()


def stop(*_: object) -> None:
    """Ends whatever runs; nothing more is begun."""
    _stopped.set()
    for process in list(_running):
        _signal(process, signal.SIGKILL)


def run(stage: Stage, seconds: float, log: Log) -> None:
    """Runs one stage for at most so long: its result, its time, and the end of its output."""
    if _stopped.is_set():
        stage.result = "failed: the run was stopped"
        return
    if stage.skipped:
        stage.result = f"skipped: {stage.skipped}"
        return
    limit = min(stage.limit, seconds)
    if limit < 1:
        stage.result = "failed: no time was left"
        return
    begin = time.monotonic()
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths), **stage.environment}
    try:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        stage.result = f"failed: {error}"
        return
    _running.add(process)
    printed = threading.Event()

    def read() -> None:
        for text in process.stdout or ():
            stage.tail = [*stage.tail[1 - _TAIL :], text.rstrip("\n")]
            if stage.must_print and re.search(stage.must_print, text):
                printed.set()
            log.write(stage.name, text.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    late = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        _end(process)
    reader.join(_GRACE)
    stage.seconds = time.monotonic() - begin
    if late:
        stage.result = f"failed: stopped after {limit:.0f} s"
    elif process.returncode == 5 and "-m" in stage.command:
        stage.result = "failed: no tests were selected"
    elif process.returncode:
        stage.result = f"failed: exit status {process.returncode}"
    elif stage.must_print and not printed.is_set():
        stage.result = f"failed: it did not print '{stage.must_print}'"
    else:
        stage.result = "passed"


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a stage and whatever it started: asked first, so that pytest writes its report, then told."""
    if process.poll() is None:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    _signal(process, signal.SIGKILL)
    process.wait()
    _running.discard(process)


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def run_all(wanted: Sequence[Stage], seconds: float, log: Log, report: Callable[[], None]) -> None:
    """Phase by phase, its lanes at the same time."""
    deadline = time.monotonic() + seconds

    def run_lane(lane: list[Stage]) -> None:
        for stage in lane:
            run(stage, deadline - time.monotonic(), log)
            log.write(stage.name, f"{stage.result} ({stage.seconds:.0f} s)")
            with lock:
                report()

    lock = threading.Lock()
    for phase in sorted({stage.phase for stage in wanted}):
        lanes: dict[str, list[Stage]] = {}
        for stage in wanted:
            if stage.phase == phase:
                lanes.setdefault(stage.lane, []).append(stage)
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(run_lane, lanes.values()))


def summary(wanted: Sequence[Stage], out: Path) -> str:
    """The folder in one page."""
    lines = [
        "# GPU report",
        "",
        *(f"- {fact}" for fact in facts()),
        "",
        "| stage | result | seconds |",
        "|---|---|---|",
    ]
    lines += [f"| {stage.name} | {stage.result} | {stage.seconds:.0f} |" for stage in wanted]
    for name in ("gpu", "kernels"):
        if (counts := junit_counts(out / f"junit-{name}.xml")) is not None:
            lines += ["", f"junit-{name}.xml: {counts}"]
    steps = sorted(out.glob("*-steps.csv"))
    kernels = sorted(set(out.glob("*.csv")) - set(steps))
    lines += [""]
    for path in kernels:
        lines += tables(path)
    for path in steps:
        lines += steps_table(path)
    for stage in wanted:
        if stage.result.startswith("failed"):
            lines += ["", f"## The end of: {stage.name}", "", "```", *stage.tail, "```"]
    return "\n".join(lines) + "\n"


@functools.cache
def facts() -> list[str]:
    """When, on what, with what."""
    found = [f"date: {datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')}"]
    found.append(f"Python {platform.python_version()} on {platform.system()}, {os.cpu_count()} cores")
    for command in (
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"],
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        [sys.executable, "-c", "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda)"],
        [sys.executable, "-c", "import triton; print('triton', triton.__version__)"],
        ["nvcc", "--version"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and (text := done.stdout.strip()):
            found.append(f"{'commit ' if command[0] == 'git' else ''}{text.splitlines()[-1]}")
    return found


def junit_counts(path: Path) -> str | None:
    """The totals of a JUnit file, and the tests that failed; None if it is not there."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return None
    suites = list(root.iter("testsuite"))
    total = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        c.get("name", "?")
        for c in root.iter("testcase")
        if c.find("failure") is not None or c.find("error") is not None
    ]
    text = ", ".join(f"{count} {key}" for key, count in total.items())
    return text + (f"; failed: {', '.join(failed[:20])}{' ...' if len(failed) > 20 else ''}" if failed else "")


def tables(path: Path) -> list[str]:
    """Gram and combine against a copy, latencies, and counts, from the CSV of the benchmark."""
    rows = read_csv(path)
    lines: list[str] = []
    for kernel in ("gram", "combine", "pcgrad_step", "mgda_step"):
        ours = [r for r in rows if r["kernel"] == kernel and r["provider"] == "mtl-kernels" and r["denominator_us"]]
        if ours:
            lines += [
                f"## {kernel}",
                "",
                "| K | N | dtype | us | GB/s | of a copy | budget kept |",
                "|---|---|---|---|---|---|---|",
            ]
            ours.sort(key=lambda row: (row["dtype"], int(row["N"]), int(row["K"])))
        for r in ours:
            share = f"{1 / float(r['ratio']):.2f}" if r["ratio"] else "WRONG"
            cells = (r["K"], r["N"], r["dtype"], r["median_us"], r["gb_per_s"], share, r["within_budget"])
            lines.append(f"| {' | '.join(cells)} |")
        lines += [""] if ours else []
    small = [r for r in rows if r["measure"] in ("call", "latency") and r["provider"] == "mtl-kernels"
             and (r["N"] == "10000" or r["batch"] == "1")]  # fmt: skip
    if small:
        lines += ["## Calls at N = 10000 and solvers of one problem, microseconds", "",
                  "| kernel | K | dtype | what | us | budget kept |", "|---|---|---|---|---|---|"]  # fmt: skip
        keys = ("kernel", "K", "dtype", "measure", "median_us", "within_budget")
        lines += [f"| {' | '.join(r[key] for key in keys)} |" for r in small]
        lines.append("")
    counts = [r for r in rows if r["measure"] == "count"]
    if counts:
        lines += [
            "## What one call does, K = 8",
            "",
            "| call | kernels | copies | waits | budget kept |",
            "|---|---|---|---|---|",
        ]
        keys = ("kernel", "launches", "copies", "syncs", "within_budget")
        lines += [f"| {' | '.join(r[key] for key in keys)} |" for r in counts]
        lines.append("")
    return lines


def steps_table(path: Path) -> list[str]:
    """The training steps, from their CSV."""
    rows = read_csv(path)
    keys = ("K", "method", "provider", "median_ms", "combine_ms", "ratio_to_K_backwards", "launches", "copies", "syncs")
    if not rows:
        return []
    head = ["## Training steps", "", f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    return [*head, *(f"| {' | '.join(row[key] for key in keys)} |" for row in rows)]


def read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for at most eight files")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these, by the first word or more of a name")
    parser.add_argument("--seconds", type=float, default=465.0, help="for all stages together (default: 465)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, planned: Sequence[Stage] | None = None) -> int:
    """Runs the stages and writes the folder; 1 when a stage failed, 2 when there is none of that name."""
    options = parse(arguments)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    wanted = list(stages(out, options.jobs) if planned is None else planned)
    names = [stage.name for stage in wanted]
    if options.stages:
        unknown = [name for name in options.stages if not any(known.startswith(name) for known in names)]
        if unknown:
            print(f"no stage is called {unknown[0]!r}; there are: {', '.join(names)}", file=sys.stderr)
            return 2
        wanted = [stage for stage in wanted if any(stage.name.startswith(name) for name in options.stages)]
    log = Log(out / "gpu.log")

    def report() -> None:
        (out / "summary.md").write_text(summary(wanted, out))

    _stopped.clear()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run_all(wanted, options.seconds, log, report)
    finally:
        report()
        log.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    print((out / "summary.md").read_text())
    return 1 if any(stage.result.startswith(("failed", "not run")) for stage in wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
