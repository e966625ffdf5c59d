"""Runs tests in several processes of pytest at once, each test in one of them.

A process that dies, hangs in a test or loses its GPU's context is replaced: the test that did it is an error, and the
next process goes on behind it. Without a plugin for pytest that would have to be installed.

    python benchmarks/suite.py cuda --jobs 4 --junit cuda.xml -- tests/kernels --device cuda -k cuda
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.junit import Result, write_junit
from benchmarks.provenance import ROOT
from benchmarks.shard import LOST

_POLL = 0.1
_START = 120.0
"""Seconds in which a process must come to its first test."""
_MOST_LINES = 60
_SLOWEST = 5
_DOTS = re.compile(r"[.sFExX]+\s*(\[.*\])?")
_DONE = (0, 1, 5)
"""Exit statuses of pytest: all passed, some failed, none was left."""


@dataclass
class Share:
    """What one process and those that replaced it did."""

    place: int
    record: Path
    output: Path
    tests: dict[str, Result] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    process: int = 0
    """The process that runs the tests, which need not be the one that was started."""
    _read: int = 0

    def update(self) -> str:
        """Reads what was written since; the test that is running, or an empty string."""
        if self.record.exists():
            with self.record.open("rb") as file:
                file.seek(self._read)
                lines = file.read().splitlines(keepends=True)
            for text in lines:
                if not text.endswith(b"\n"):  # still being written
                    break
                self._read += len(text)
                self._take(json.loads(text))
        return next((test.name for test in self.tests.values() if test.outcome == "running"), "")

    def _take(self, entry: dict[str, Any]) -> None:
        self.process = entry.get("process", self.process)
        for name in entry.get("tests", ()):
            self.tests.setdefault(name, Result(name, "not run", text="not run"))
        if "begin" in entry:
            self.tests[entry["begin"]].outcome = "running"
        if "end" in entry:
            self.tests[entry["end"]] = Result(entry["end"], entry["outcome"], entry["seconds"], entry["text"])

    def begun(self) -> int:
        return sum(test.outcome != "not run" for test in self.tests.values())


class Suite:
    """The processes of one run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.shares = [Share(i, folder / f"{i}.jsonl", folder / f"{i}.txt") for i in range(options.jobs)]
        self._stopped = threading.Event()

    def run(self) -> None:
        """Until every test has ended, or the run is interrupted."""
        with ThreadPoolExecutor(len(self.shares)) as pool:
            try:
                for done in [pool.submit(self._follow, share) for share in self.shares]:
                    done.result()
            finally:
                self._stopped.set()

    def _follow(self, share: Share) -> None:
        """Starts processes until the share is done."""
        while not self._stopped.is_set():
            before = share.begun()
            status, reason = self._run_process(share)
            running = share.update()
            if self._stopped.is_set():
                return
            if running:
                share.tests[running] = Result(running, "error", text=f"{reason}; its process was lost")
            elif status not in (*_DONE, LOST):
                share.faults.append(reason)
            if status in _DONE or share.begun() == before:
                return

    def _run_process(self, share: Share) -> tuple[int | None, str]:
        """Its exit status, None where it was ended because it hung; and that in words."""
        share_of = [f"--share={share.place}/{len(self.shares)}", f"--record={share.record}"]
        command = [*shlex.split(self.options.under), sys.executable, "-m", "pytest", "-q", "--tb=short",
                   "-p", "no:cacheprovider", "-p", "benchmarks.shard", *share_of, *self.options.tests]  # fmt: skip
        with share.output.open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        share.process = process.pid
        try:
            hung = self._wait(process, share)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(share.process, signal.SIGKILL)
                process.kill()
            process.wait()
        said = share.output.read_text(errors="replace")
        self._show(share, said, process.returncode)
        if not hung and not re.search(self.options.must_print, said):
            share.faults.append(f"a process did not print {self.options.must_print!r}")
        if hung:
            return None, f"it was stopped after {hung:.0f} s"
        status = process.returncode
        return status, f"its process died of signal {-status}" if status < 0 else f"its process ended with {status}"

    def _wait(self, process: subprocess.Popen[bytes], share: Share) -> float:
        """Until it ends; after how many seconds in one test it is given up, else 0."""
        at, since = "", time.monotonic()
        while process.poll() is None and not self._stopped.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL)
            now = share.update()
            if now != at:
                at, since = now, time.monotonic()
            most: float = self.options.each if at else _START
            if time.monotonic() - since > most:
                return most
        return 0.0

    def _show(self, share: Share, said: str, status: int) -> None:
        """What a process printed, but for the dots of its tests."""
        lines = [text for text in said.splitlines() if text.strip() and not _DOTS.fullmatch(text)]
        if self.options.under or status not in _DONE:
            print(*(f"{share.place}: {text}" for text in lines[-_MOST_LINES:]), sep="\n", flush=True)


def outcomes(shares: list[Share]) -> Iterator[Result]:
    for share in shares:
        yield from share.tests.values()


def report(name: str, shares: list[Share], seconds: float) -> int:
    """Prints what failed, what took long, and how many; the exit status."""
    tests = list(outcomes(shares))
    for test in tests:
        if test.outcome in ("failed", "error"):
            print(f"{test.outcome.upper()} {test.name} - {(test.text.strip() or 'no reason').splitlines()[-1]}")
    if left := [test.name for test in tests if test.outcome == "not run"]:
        print(f"not run: {left[0]}" + (f" and {len(left) - 1} more" if len(left) > 1 else ""))
    for fault in sorted({fault for share in shares for fault in share.faults}):
        print(f"{name}: {fault}")
    for test in sorted(tests, key=lambda test: -test.seconds)[:_SLOWEST]:
        print(f"{test.seconds:.2f}s {test.name}")
    print(f"{sum(test.seconds for test in tests):.0f} s of tests in {len(shares)} processes")
    found = Counter(test.outcome for test in tests)
    order = ("failed", "error", "not run", "passed", "skipped")
    counts = ", ".join(f"{found[word]} {word.replace(' ', '-')}" for word in order if found[word])
    print(f"{counts or 'no tests'} in {seconds:.2f}s", flush=True)
    bad = found["failed"] + found["error"] + found["not run"] + sum(len(share.faults) for share in shares)
    return 1 if bad else 0 if tests else 5


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite; 1 when a test failed or was not run, 5 without tests."""
    parser = argparse.ArgumentParser(prog="benchmarks/suite.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("name", help="of the suite in the results")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--junit", type=Path, help="file of the results")
    parser.add_argument("--each", type=float, default=60.0, help="seconds that a test may take (default: 60)")
    parser.add_argument("--under", default="", help="a program that every process runs under, with its options")
    parser.add_argument("--must-print", default="", help="a pattern that every process must print")
    parser.add_argument("tests", nargs="+", help="what pytest is told, after --")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(options, Path(folder))
        stopped = False
        try:
            suite.run()
        except KeyboardInterrupt:
            stopped = True
        for share in suite.shares:
            if (running := share.update()) and stopped:
                share.tests[running] = Result(running, "not run", text="the run was stopped")
        status = report(options.name, suite.shares, time.monotonic() - begin)
        if options.junit is not None:
            write_junit(options.junit, options.name, list(outcomes(suite.shares)))
    return 1 if stopped else status


if __name__ == "__main__":
    sys.exit(main())
