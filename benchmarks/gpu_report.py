"""Builds, measures and tests on a GPU, stage by stage, and leaves one folder with the results: ``make gpu OUT=dir``.

Every stage has a time limit of its own and all of them share one; a stage that fails or is late is recorded and the
others go on. Its output goes to the terminal and to gpu.log line by line, and summary.md and junit.xml are written anew
after every stage, so that whatever ends the run loses nothing. The status is that of the worst stage.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.junit import merge_junit
from benchmarks.provenance import commit
from benchmarks.runner import Log, run_all, stoppable
from benchmarks.stages import SECONDS, Plan, Stage
from benchmarks.summary import summary

_QUESTIONS = (
    ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
    ["nvcc", "--version"],
    # Also brings torch into the system's cache of files, before it is imported where time counts.
    [sys.executable, "-c", "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda)"],
    [sys.executable, "-c", "import triton; print('triton', triton.__version__)"],
)


def facts_of_the_host() -> list[str]:
    """When, of what, and where."""
    return [
        f"date: {datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')}",
        f"commit {commit()}",
        f"Python {platform.python_version()} on {platform.system()}, {os.cpu_count()} cores",
    ]


def ask(facts: list[str]) -> None:
    """Adds what other programs know; takes seconds."""
    for command in _QUESTIONS:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and (text := done.stdout.strip()):
            facts.append(text.splitlines()[-1])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for at most eight files")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these, by the first word or more of a name")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all stages (default: {SECONDS:.0f})")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: few and small cases on the CPU")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, planned: Sequence[Stage] | None = None) -> int:
    """Runs the stages and writes the folder; 1 when a stage failed, 2 when there is none of that name."""
    options = parse(arguments)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        plan = Plan(out, Path(scratch), options.jobs, "cpu" if options.dry_run else "cuda")
        wanted = list(plan.stages() if planned is None else planned)
        names = [stage.name for stage in wanted]
        for name in options.stages or ():
            if not any(known.startswith(name) for known in names):
                print(f"no stage is called {name!r}; there are: {', '.join(names)}", file=sys.stderr)
                return 2
        if options.stages:
            wanted = [stage for stage in wanted if any(stage.name.startswith(name) for name in options.stages)]
        facts = facts_of_the_host()
        if options.dry_run:
            facts.insert(0, "a dry run on the CPU: its numbers mean nothing")
            for stage in wanted:  # whose limits are those of a GPU
                stage.limit *= 10
        return run(wanted, options.seconds, out, Path(scratch), facts)


def run(wanted: Sequence[Stage], seconds: float, out: Path, scratch: Path, facts: list[str]) -> int:
    """Runs stages, whose results of tests are in ``scratch``; 1 when one failed."""
    begin = time.time()
    (out / "junit.xml").unlink(missing_ok=True)
    log = Log(out / "gpu.log")
    asking = threading.Thread(target=ask, args=(facts,), daemon=True)

    def report() -> None:
        merge_junit(scratch.glob("*.xml"), out / "junit.xml")
        try:
            text = summary(wanted, out, list(facts), begin)
        except Exception as error:  # half a file, say; the run is worth more than its page
            text = summary(wanted, out, [*facts, f"no tables: {error!r}"], math.inf)
        (out / "summary.md").write_text(text)

    try:
        with stoppable():
            asking.start()
            run_all(wanted, seconds, log, report)
    finally:
        asking.join(5)
        report()
        log.close()
    print((out / "summary.md").read_text())
    return 1 if any(stage.result.startswith(("failed", "not run")) for stage in wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
