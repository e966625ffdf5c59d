"""A plugin of pytest for one of several processes that share a suite; `suite` starts them.

It keeps a share of the tests, leaves out those that a process before it began, and writes a line for every one that
begins and ends, so that nothing is lost when the process is. It goes no further once the GPU's context is lost: every
test from there on would fail.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import zlib
from pathlib import Path

import pytest

LOST = 87
"""The exit status of a process that ended because its device is beyond use."""
_MOST_TEXT = 20_000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", metavar="I/N", help="the I-th of N shares of the tests, from 0 on")
    parser.addoption("--record", type=Path, metavar="FILE", help="lines of JSON for the tests of this share")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("record")) is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process also ends it
        config.pluginmanager.register(_Share(path, *map(int, config.getoption("share").split("/"))))


class _Share:
    def __init__(self, path: Path, place: int, shares: int) -> None:
        self._place, self._shares = place, shares
        lines = path.read_text().splitlines() if path.exists() else []
        self._begun = {entry["begin"] for entry in map(json.loads, lines) if "begin" in entry}
        self._file = path.open("a", buffering=1)
        self._outcome, self._text, self._seconds = "passed", "", 0.0
        self._write(process=os.getpid())

    def _write(self, **entry: object) -> None:
        self._file.write(json.dumps(entry) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """By the name, so that every process comes to the same shares."""
        mine = [item for item in items if zlib.crc32(item.nodeid.encode()) % self._shares == self._place]
        self._write(tests=[item.nodeid for item in mine])
        left = [item for item in mine if item.nodeid not in self._begun]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(left)])
        items[:] = left

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._outcome, self._text, self._seconds = "passed", "", 0.0
        self._write(begin=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of set-up, call and tear-down the worst."""
        self._seconds += report.duration
        if report.failed:
            self._fail("failed" if report.when == "call" else "error", report.longreprtext)
        elif report.skipped and self._outcome == "passed":
            self._outcome = "skipped"
            self._text = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")

    def _fail(self, outcome: str, text: str) -> None:
        self._outcome = outcome
        self._text = f"{self._text}\n{text}".strip()[-_MOST_TEXT:]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        lost = _lost()
        if lost and self._outcome in ("passed", "skipped"):
            self._fail("failed", f"the device is beyond use after it: {lost}")
        self._write(end=nodeid, outcome=self._outcome, seconds=round(self._seconds, 3), text=self._text)
        if lost:
            pytest.exit(f"the device is beyond use: {lost}", returncode=LOST)


def _lost() -> str:
    """What a GPU that was in use says when it is waited for; empty where all is well."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).strip().split("\n")[0]
    return ""
