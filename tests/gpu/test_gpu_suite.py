"""Tests in several processes: each runs once, and one that takes its process down leaves the others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import suite
from benchmarks.junit import Result, merge_junit, write_junit
from benchmarks.provenance import ROOT

MIXED = """
import os, signal, sys, time, types
import pytest

@pytest.mark.parametrize("i", range(20))
def test_right(i):
    pass

def test_wrong():
    assert "this" == "that"

def test_skipped():
    pytest.skip("for a reason")

@pytest.fixture
def torn():
    yield
    raise ValueError("in the end")

def test_tear_down(torn):
    pass

@pytest.mark.parametrize("i", range(2))
def test_dies(i):
    os.kill(os.getpid(), signal.SIGSEGV)

def test_hangs():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)

def poison():
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

def test_poisons():
    poison()

def test_poisons_and_says_so():
    poison()
    raise RuntimeError("gram: an illegal memory access was encountered")

@pytest.mark.parametrize("i", range(20))
def test_right_too(i):
    assert "torch" not in sys.modules, "no test runs behind one that lost the device"
"""

WRONG = {
    "test_wrong": ("failure", "AssertionError"),
    "test_tear_down": ("error", "in the end"),
    "test_dies[0]": ("error", "its process died of signal 11"),
    "test_dies[1]": ("error", "its process died of signal 11"),
    "test_hangs": ("error", "it was stopped after 4 s"),
    "test_poisons": ("failure", "beyond use after it: CUDA error: an illegal memory access was encountered"),
    "test_poisons_and_says_so": ("failure", "gram: an illegal memory access"),
}


def cases(path: Path) -> dict[str, ElementTree.Element]:
    found = list(ElementTree.parse(path).getroot().iter("testcase"))
    assert len(found) == len({case.get("name") for case in found}), "every test once"
    return {str(case.get("name")): case for case in found}


def write(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "test_mixed.py").write_text(text)
    return [str(tmp_path / "test_mixed.py"), "-p", "no:hypothesispytest"]


@pytest.mark.parametrize("jobs", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
def test_every_test_runs_once(jobs: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    junit = tmp_path / "x.xml"
    arguments = ["mixed", "--jobs", str(jobs), "--junit", str(junit), "--each", "4", "--"]
    assert suite.main([*arguments, *write(tmp_path, MIXED)]) == 1
    found = cases(junit)
    assert len(found) == 40 + len(WRONG) + 1
    for name, (tag, text) in WRONG.items():
        element = found[name].find(tag)
        assert element is not None and text in (element.text or ""), name
    skipped = found["test_skipped"].find("skipped")
    assert skipped is not None and "for a reason" in (skipped.text or "")
    assert sum(len(case) == 0 for case in found.values()) == 40
    said = capfd.readouterr().out
    assert "3 failed, 4 error, 40 passed, 1 skipped in " in said.splitlines()[-1]
    assert "test_mixed.py::test_dies[0] - its process died of signal 11; its process was lost" in said


def test_all_is_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tests = write(tmp_path, "def test_a(): pass\ndef test_b(): pass")
    assert suite.main(["right", "--jobs", "4", "--", *tests]) == 0, "shares without a test are no fault"
    assert suite.main(["none", "--", *tests, "-k", "nothing"]) == 5
    said = capfd.readouterr().out.splitlines()
    assert said[-1].startswith("no tests in ") and any(text.startswith("2 passed in ") for text in said)


def test_a_file_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["broken", "--", *write(tmp_path, "import no_such_module")]) == 1
    said = capfd.readouterr().out
    assert "no_such_module" in said and "broken: its process ended with 2" in said


@pytest.mark.parametrize(("ends", "status"), [("echo 0 errors", 0), ("true", 1), ("echo 0 errors; exit 86", 1)])
def test_under_another_program(ends: str, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "sanitizer"
    program.write_text(f'#!/bin/sh\nshift\n"$@"\n{ends}\n')
    program.chmod(0o755)
    tests = write(tmp_path, "import pytest\n@pytest.mark.parametrize('i', range(9))\ndef test(i): pass")
    under = ["--under", f"{program} memcheck", "--must-print", "0 errors"]
    assert suite.main(["memcheck", "--jobs", "2", *under, "--", *tests]) == status
    said = capfd.readouterr().out
    assert "9 passed in " in said.splitlines()[-1]
    assert ("memcheck: a process did not print '0 errors'" in said) == (ends == "true")
    assert ("memcheck: its process ended with 86" in said) == ("86" in ends)
    assert ("0: 0 errors" in said) == ("0 errors" in ends), "what the program says is shown"


def test_a_run_that_is_stopped_leaves_its_results_and_no_process(tmp_path: Path) -> None:
    text = f"""
import os, pathlib, time
def test_done(): pass
def test_runs():
    pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
    time.sleep(600)
def test_left(): pass
"""
    command = [sys.executable, "-u", "benchmarks/suite.py", "stopped", "--junit", str(tmp_path / "x.xml"), "--"]
    process = subprocess.Popen([*command, *write(tmp_path, text)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    begin = time.monotonic()
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() - begin < 300 and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a stage is asked to end
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "2 not-run, 1 passed" in said and "not run: " in said
    assert {name: len(case) for name, case in cases(tmp_path / "x.xml").items()} == {
        "test_done": 0, "test_runs": 1, "test_left": 1,
    }  # fmt: skip
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_files_of_results_become_one(tmp_path: Path) -> None:
    write_junit(tmp_path / "a.xml", "cuda", [Result("tests/a.py::test[\x1b x]", "failed", 0.5, "bad \x00 byte\nlast")])
    write_junit(tmp_path / "b.xml", "triton", [Result("tests/b.py::C::test", "passed", 1.0), Result("b", "not run")])
    (tmp_path / "half.xml").write_text("<testsuites><testsuite")
    merge_junit(tmp_path.glob("*.xml"), tmp_path / "all.xml")
    suites = list(ElementTree.parse(tmp_path / "all.xml").getroot())
    assert [(s.get("name"), s.get("tests"), s.get("failures"), s.get("errors")) for s in suites] == [
        ("cuda", "1", "1", "0"), ("triton", "2", "0", "1"),
    ]  # fmt: skip
    case = suites[0][0]
    assert (case.get("classname"), case.get("name")) == ("tests.a", "test[? x]")
    assert case[0].get("message") == "last"
    merge_junit([tmp_path / "half.xml"], tmp_path / "none.xml")
    assert not (tmp_path / "none.xml").exists()
