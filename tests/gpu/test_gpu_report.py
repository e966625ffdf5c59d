"""The stages of `make gpu` with commands that pass, fail, hang or are not there."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.gpu_report import Stage, main, stages


def stage(name: str, code: str, **options: object) -> Stage:
    return Stage(name, [sys.executable, "-c", code], **{"limit": 60.0, **options})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "_GRACE", 0.5)
    monkeypatch.setattr(gpu_report, "facts", lambda: ["date: today"])


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
    assert "| build | passed |" in text and "| bench | passed |" in text and "date: today" in text
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
    begin = time.monotonic()
    assert main(["--out", str(tmp_path)], [hanging, stage("next", "print('on')", phase=1)]) == 1
    assert time.monotonic() - begin < 30
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


def test_success_that_proves_nothing(tmp_path: Path) -> None:
    planned = [
        stage("memcheck", "print('nothing was attached to')", must_print="ERROR SUMMARY: 0 errors"),
        stage("racecheck", "print('== RACECHECK SUMMARY: 0 hazards displayed')", must_print="SUMMARY: 0 hazards"),
    ]
    assert main(["--out", str(tmp_path)], planned) == 1
    assert planned[0].result.startswith("failed: it did not print") and planned[1].result == "passed"


def test_lanes_of_a_phase_run_at_the_same_time(tmp_path: Path) -> None:
    meet = "import pathlib, time\nmine, other = (pathlib.Path(p) for p in {!r})\nmine.touch()\n"
    meet += "begin = time.time()\nwhile not other.exists():\n    assert time.time() - begin < 30\n    time.sleep(0.01)"
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


def test_what_make_gpu_runs(tmp_path: Path) -> None:
    found = {s.name: s for s in stages(tmp_path, 16)}
    assert list(found) == [
        "build", "gpu tests", "kernel suite", "memcheck", "racecheck", "kernel benchmarks", "step benchmarks",
    ]  # fmt: skip
    assert found["build"].environment["MTL_KERNELS_CUDA_ARCHS"] == "native"
    assert "--device" in found["kernel suite"].command and found["memcheck"].lane == found["racecheck"].lane
    assert found["memcheck"].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert all(s.phase == 2 for s in found.values() if "benchmarks" in s.name), "nothing else runs while these measure"


def test_the_sanitizer_has_tests_to_run() -> None:
    """The selection names tests that exist."""
    names = [word for word in gpu_report.PICKED.replace("(", " ").replace(")", " ").split() if word.startswith("test_")]
    text = "".join(path.read_text() for path in (gpu_report.ROOT / "tests" / "kernels").glob("test_*.py"))
    assert names and all(f"def {name}" in text for name in names)


def test_the_summary_of_what_was_measured(tmp_path: Path) -> None:
    from benchmarks.results import Row, write_csv

    def row(kernel: str, **columns: object) -> Row:
        found = Row(kernel, "mtl-kernels", 8, 10**8, "float32", 800.0, 790.0, 810.0, denominator_us=760.0)
        for name, value in columns.items():
            setattr(found, name, value)
        return found

    right = row("gram", gb_per_s=4000.0, ratio=1.05, measure="graph", within_budget=True)
    wrong = row("combine", gb_per_s=4000.0, measure="graph", correct=False)
    latency = Row("pcgrad_step", "mtl-kernels", 8, 10**4, "float32", 21.0, 20.0, 22.0, measure="latency")
    count = Row("gram", "mtl-kernels", 8, 10, "float32", 0.0, 0.0, 0.0, measure="count", launches=1, copies=0, syncs=0)
    write_csv([right, wrong, latency, count], tmp_path / "card.csv")
    columns = "K,method,provider,median_ms,combine_ms,ratio_to_K_backwards,launches,copies,syncs"
    (tmp_path / "card-steps.csv").write_text(f"{columns}\n3,pcgrad,x,1,2,3,2,0,0\n")
    (tmp_path / "junit-gpu.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="a"/>'
        '<testcase name="b"><failure/></testcase></testsuite></testsuites>'
    )
    text = gpu_report.summary([], tmp_path)
    assert "| 8 | 100000000 | float32 | 800 | 4000 | 0.95 | True |" in text and "WRONG" in text
    assert "| pcgrad_step | 8 | float32 | latency | 21 |" in text and "| gram | 1 | 0 | 0 |" in text
    assert "| 3 | pcgrad | x |" in text
    assert "3 tests, 1 failures, 0 errors, 1 skipped; failed: b" in text
