"""The stages of `make gpu` with commands that pass, fail, hang or are not there."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import gpu_report, runner
from benchmarks.gpu_report import main
from benchmarks.stages import SUITE, Stage


def stage(name: str, code: str, **options: object) -> Stage:
    options = {"limit": 60.0, "grace": 0.5, **options}
    return Stage(name, [sys.executable, "-c", code], **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_report, "_QUESTIONS", ([sys.executable, "-c", "print('the driver 580')"], ["/no/such/tool"])
    )


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    planned = [
        stage("build", "print('built')"),
        stage("tests", "print('half done'); raise SystemExit(3)", phase=1, lane="a"),
        Stage("absent", ["/no/such/program"], 5.0, 1, "b"),
        stage("left out", "", phase=1, lane="b", skipped="the sanitizer is not installed"),
        stage("bench", "import os; print('with', os.environ['GIVEN'])", phase=2, environment={"GIVEN": "7"}),
    ]
    assert main(["--out", str(tmp_path)], planned) == 1
    text = (tmp_path / "summary.md").read_text()
    assert "| build | passed |" in text and "| bench | passed |" in text
    assert "- date: " in text and "- commit " in text and "- the driver 580" in text
    assert "| tests | failed: exit status 3 |" in text and "half done" in text.split("## The end of: tests")[1]
    assert "| absent | failed: " in text and "| left out | skipped: the sanitizer is not installed |" in text
    log = (tmp_path / "gpu.log").read_text()
    assert "[build] built" in log and "[bench] with 7" in log
    assert log.index("built") < log.index("half done") < log.index("with 7")


def test_all_passed(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path)], [stage("build", ""), stage("bench", "", phase=1)]) == 0


def test_a_stage_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
print("started", flush=True)
time.sleep(600)
"""
    hanging = stage("hangs", code, limit=4.0)
    assert main(["--out", str(tmp_path)], [hanging, stage("next", "print('on')", phase=1)]) == 1
    assert hanging.result == "failed: stopped after 4 s"
    log = (tmp_path / "gpu.log").read_text()
    assert "[hangs] started" in log and "[next] on" in log
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of the stage is still there")


def test_a_stage_is_asked_to_end_before_it_is_told(tmp_path: Path) -> None:
    code = """
import time
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("wrote what there was", flush=True)
"""
    assert main(["--out", str(tmp_path)], [stage("slow", code, limit=3.0)]) == 1
    assert "[slow] wrote what there was" in (tmp_path / "gpu.log").read_text()


def test_no_time_left(tmp_path: Path) -> None:
    planned = [stage("first", "import time; time.sleep(1.2)"), stage("second", "", phase=1)]
    assert main(["--out", str(tmp_path), "--seconds", "2"], planned) == 1
    assert planned[1].result == "failed: no time was left"


def test_what_was_not_used_goes_to_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_START", 1.0)
    printed = "import sys; print('given', sys.argv[1])"
    planned = [
        stage("build", "", limit=30.0),
        stage("bench", printed, phase=1, limit=5.0, stretches=True),
        stage("short", printed, phase=2, limit=5.0),
        stage("long", "", phase=2, limit=20.0, lane="beside"),
    ]
    for each in planned[1:3]:
        each.command.append("{seconds}")
    assert main(["--out", str(tmp_path), "--seconds", "80"], planned) == 0
    given = [
        int(text.split("given ")[1]) for text in (tmp_path / "gpu.log").read_text().splitlines() if "given " in text
    ]
    assert 40 <= given[0] <= 80 - 20.5 - 0.5 - 1, "all but what is set aside for the tests, less the start"
    assert given[1] == 4


def test_success_that_proves_nothing(tmp_path: Path) -> None:
    clean = "== RACECHECK SUMMARY: 0 hazards displayed"
    patterns = ("SUMMARY: 0 hazards", r"\b[1-9]\d* passed")
    planned = [
        stage("memcheck", "print('nothing was attached to')", must_print=("ERROR SUMMARY: 0 errors",)),
        stage("skipped", f"print('3 skipped in 0.1s'); print({clean!r})", must_print=patterns),
        stage("racecheck", f"print('12 passed in 0.1s'); print({clean!r})", must_print=patterns),
    ]
    assert main(["--out", str(tmp_path)], planned) == 1
    assert [each.result.startswith("failed: it did not print") for each in planned] == [True, True, False]
    assert planned[2].result == "passed"


def test_files_of_an_earlier_run_are_not_reported(tmp_path: Path) -> None:
    header = "kernel,provider,K,N,dtype,measure,correct,batch,backend,within_budget,note,ratio,budget,median_us,error"
    (tmp_path / "old.csv").write_text(f"{header}\ngram,mtl-kernels,7,10,float32,failed,,,,,from before,,,,\n")
    os.utime(tmp_path / "old.csv", (1e9, 1e9))
    copy = f"import shutil; shutil.copyfile({str(tmp_path / 'old.csv')!r}, {str(tmp_path / 'new.csv')!r})"
    assert main(["--out", str(tmp_path)], [stage("bench", "")]) == 0
    assert "from before" not in (tmp_path / "summary.md").read_text()
    assert main(["--out", str(tmp_path)], [stage("bench", copy)]) == 0
    assert "from before" in (tmp_path / "summary.md").read_text()


def test_half_a_file_does_not_stop_the_run(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'x.csv')!r}, 'w').write('kernel,provider\\ngram,mtl-ker')"
    planned = [stage("bench", code), stage("tests", "", phase=1)]
    assert main(["--out", str(tmp_path)], planned) == 0
    text = (tmp_path / "summary.md").read_text()
    assert "no tables: KeyError" in text and "| tests | passed |" in text


def test_the_outcome_of_tests_is_told(tmp_path: Path) -> None:
    code = """
print("FAILED tests/kernels/test_gram.py::test_dense_rows[cuda-2-1] - AssertionError")
print("ERROR tests/kernels/test_gram.py::test_long_rows[cuda-heavy tails-13] - its process died - of signal 11")
print("==== 1 failed, 1 error, 2 not-run, 690 passed, 30 skipped in 28.95s ====")
raise SystemExit(1)
"""
    planned = [stage("suite", code)]
    assert main(["--out", str(tmp_path)], planned) == 1
    text = (tmp_path / "summary.md").read_text()
    assert "| 1 failed, 1 error, 2 not-run, 690 passed, 30 skipped in 28.95s |" in text
    names = "test_gram.py::test_dense_rows[cuda-2-1], tests/kernels/test_gram.py::test_long_rows[cuda-heavy tails-13]"
    assert f"Failed in suite: tests/kernels/{names}\n" in text


def test_lanes_of_a_phase_run_at_the_same_time(tmp_path: Path) -> None:
    meet = "import pathlib, time\nmine, other = (pathlib.Path(p) for p in {!r})\nmine.touch()\n"
    meet += "begin = time.time()\nwhile not other.exists():\n    assert time.time() - begin < 300\n    time.sleep(0.01)"
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    planned = [
        stage("a", meet.format((here, there)), phase=1, lane="a"),
        stage("b", meet.format((there, here)), phase=1, lane="b"),
    ]
    assert main(["--out", str(tmp_path / "out")], planned) == 0


def test_a_signal_ends_the_run_and_the_summary_is_written(tmp_path: Path) -> None:
    planned = [stage("long", "import time; print('up', flush=True); time.sleep(600)"), stage("never", "", phase=1)]

    def interrupt() -> None:
        for _ in range(600):
            if (tmp_path / "gpu.log").exists() and "up" in (tmp_path / "gpu.log").read_text():
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["--out", str(tmp_path)], planned) == 1
    thread.join()
    assert "| never | failed: the run was stopped |" in (tmp_path / "summary.md").read_text()


def test_a_subset_of_the_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = [stage("build", "print('no')"), stage("gpu tests", "print('yes')", phase=1)]
    assert main(["--out", str(tmp_path), "--stages", "gpu"], planned) == 0
    log = (tmp_path / "gpu.log").read_text()
    assert "yes" in log and "no" not in log
    assert main(["--out", str(tmp_path), "--stages", "nope"], planned) == 2
    assert "there are: build, gpu tests" in capsys.readouterr().err


def test_results_of_tests_become_one_file(tmp_path: Path) -> None:
    """Of the folder that the stages were planned with; a stage that is killed leaves half a file, or none."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "junit.xml").write_text("of an earlier run")
    folder = tmp_path / "scratch"
    folder.mkdir()
    code = "from benchmarks.junit import *; from pathlib import Path; "
    code += f"write_junit(Path({str(folder / 'NAME.xml')!r}), 'NAME', [Result('tests/x.py::test', 'passed')])"
    planned = [
        stage("cuda", code.replace("NAME", "cuda")),
        stage("triton", code.replace("NAME", "triton"), phase=1),
        stage("killed", f"open({str(folder / 'killed.xml')!r}, 'w').write('<testsuites>')", phase=2),
    ]
    assert gpu_report.run(planned, 60.0, tmp_path / "out", folder, []) == 0
    text = (tmp_path / "out" / "junit.xml").read_text()
    assert text.count("<testsuite ") == 2 and "earlier" not in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.log", "junit.xml", "summary.md"]


def test_a_suite_without_tests_says_so(tmp_path: Path) -> None:
    tests = ["--", "tests/kernels/test_rng.py", "-k", "no_such_test"]
    planned = [Stage("suite", [sys.executable, SUITE, "suite", *tests], 60.0)]
    assert main(["--out", str(tmp_path)], planned) == 1
    assert planned[0].result == "failed: no tests were selected"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_dry_run(tmp_path: Path) -> None:
    """The stages as they are planned, but for the builds, on the CPU."""
    chosen = ["device", "first", "kernel", "gpu tests", "memcheck", "racecheck"]
    assert main(["--out", str(tmp_path), "--dry-run", "--jobs", "4", "--stages", *chosen]) == 0
    text = (tmp_path / "summary.md").read_text()
    for name in ("first tests", "kernel benchmarks"):
        assert f"| {name} | passed |" in text
    for name in ("device tests", "gpu tests", "memcheck", "racecheck"):
        assert f"| {name} | skipped: a dry run has no GPU |" in text
    assert "Failed" not in text and "a dry run on the CPU" in text
    suites = list(ElementTree.parse(tmp_path / "junit.xml").getroot())
    assert [each.get("name") for each in suites] == ["first tests"] and int(suites[0].get("tests", "0")) > 5
    files = list(tmp_path.iterdir())
    assert {path.suffix for path in files} == {".md", ".log", ".csv", ".png", ".xml"} and len(files) <= 7
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", path.name) and path.stat().st_size < 1 << 20 for path in files)
