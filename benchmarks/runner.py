"""Runs stages within one limit of time, whatever they do, and keeps what they print."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .provenance import ROOT
from .stages import SUITE, Stage, seconds_of

_START = 15.0
"""Seconds for a stage to start and to end what it has begun, of those that it is given."""
_TAIL = 40
_LAST_OUTPUT = 4.0
_TESTS = re.compile(r"^=*\s*((?:\d+ [\w-]+(?:, )?)+ in [\d.]+s.*?)\s*=*$")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$")


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


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM stop the run in between, and what follows it still happens."""
    _stopped.clear()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(wanted: Sequence[Stage], seconds: float, log: Log, report: Callable[[], None]) -> None:
    """Phase by phase, its lanes at the same time."""
    deadline = time.monotonic() + seconds
    lock = threading.Lock()

    def run_lane(lane: list[Stage], later: float) -> None:
        for stage in lane:
            left = deadline - time.monotonic()
            most = stage.limit + stage.grace
            run(stage, min(left, max(most, left - later) if stage.stretches else most), log)
            log.write(stage.name, f"{stage.result} ({stage.seconds:.0f} s)")
            with lock:
                report()

    phases = sorted({stage.phase for stage in wanted})
    for number, phase in enumerate(phases):
        later = sum(seconds_of([stage for stage in wanted if stage.phase == after]) for after in phases[number + 1 :])
        lanes: dict[str, list[Stage]] = {}
        for stage in wanted:
            if stage.phase == phase:
                lanes.setdefault(stage.lane, []).append(stage)
        with ThreadPoolExecutor(len(lanes)) as pool:
            for done in [pool.submit(run_lane, lane, later) for lane in lanes.values()]:
                done.result()


def run(stage: Stage, seconds: float, log: Log) -> None:
    """Runs one stage for at most so long: its result, its time, and the end of its output."""
    limit = seconds - stage.grace
    if _stopped.is_set():
        stage.result = "failed: the run was stopped"
    elif stage.skipped:
        stage.result = f"skipped: {stage.skipped}"
    elif limit < 1:
        stage.result = "failed: no time was left"
    else:
        begin = time.monotonic()
        stage.result = _run(stage, limit, log)
        stage.seconds = time.monotonic() - begin


def _run(stage: Stage, limit: float, log: Log) -> str:
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths), **stage.environment}
    words = {"{seconds}": f"{max(1.0, limit - _START):.0f}"}
    try:
        process = subprocess.Popen(
            [words.get(word, word) for word in stage.command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"failed: {error}"
    _running.add(process)
    if _stopped.is_set():  # since it was asked for last
        _signal(process, signal.SIGKILL)
    missing = list(stage.must_print)

    def read() -> None:
        for text in process.stdout or ():
            _note(stage, text.rstrip("\n"), missing)
            log.write(stage.name, text.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    late = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        _end(process, stage.grace)
    reader.join(_LAST_OUTPUT)
    if late:
        return f"failed: stopped after {limit:.0f} s"
    if process.returncode == 5 and {"pytest", SUITE}.intersection(stage.command):
        return "failed: no tests were selected"
    if process.returncode:
        return f"failed: exit status {process.returncode}"
    return f"failed: it did not print '{missing[0]}'" if missing else "passed"


def _note(stage: Stage, text: str, missing: list[str]) -> None:
    """Takes from a line of output what the report wants."""
    stage.tail = [*stage.tail[1 - _TAIL :], text]
    missing[:] = [pattern for pattern in missing if not re.search(pattern, text)]
    if (found := _TESTS.match(text)) is not None:
        stage.tests = found[1]
    if (found := _FAILED.match(text)) is not None:
        stage.failed_tests.append(found[1])


def _end(process: subprocess.Popen[str], grace: float) -> None:
    """Ends a stage and whatever it started: asked first, so that it writes its report, then told."""
    if process.poll() is None:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    _signal(process, signal.SIGKILL)
    process.wait()
    _running.discard(process)


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
