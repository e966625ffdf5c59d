"""Results of tests in JUnit's format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TAGS = {"failed": "failure", "error": "error", "skipped": "skipped", "not run": "error"}


@dataclass
class Result:
    """One test, and what became of it: passed, skipped, failed, error or not run."""

    name: str
    outcome: str
    seconds: float = 0.0
    text: str = ""


def write_junit(path: Path, suite: str, tests: Sequence[Result]) -> None:
    """Writes one suite."""
    tags = [_TAGS.get(test.outcome) for test in tests]
    counts = {f"{tag}s" if tag != "skipped" else tag: str(tags.count(tag)) for tag in ("failure", "error", "skipped")}
    seconds = f"{sum(test.seconds for test in tests):.3f}"
    element = ElementTree.Element("testsuite", {"name": suite, "tests": str(len(tests)), "time": seconds, **counts})
    for test, tag in zip(tests, tags, strict=True):
        file, _, name = test.name.partition("::")
        case = ElementTree.SubElement(element, "testcase", classname=file.removesuffix(".py").replace("/", "."),
                                      name=_printable(name), time=f"{test.seconds:.3f}")  # fmt: skip
        if tag is not None:
            text = _printable(test.text or test.outcome)
            ElementTree.SubElement(case, tag, message=text.strip().splitlines()[-1][:200]).text = text
    _write(path, [element])


def merge_junit(paths: Iterable[Path], target: Path) -> None:
    """One file of the suites of several; those that are not there or were not written to the end are left out."""
    suites = []
    for path in sorted(paths):
        try:
            suites += list(ElementTree.parse(path).getroot().iter("testsuite"))
        except (OSError, ElementTree.ParseError):
            continue
    if suites:
        _write(target, suites)


def _write(path: Path, suites: Iterable[ElementTree.Element]) -> None:
    root = ElementTree.Element("testsuites")
    root.extend(suites)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    """Without what XML cannot hold."""
    return _NOT_IN_XML.sub("?", text)
