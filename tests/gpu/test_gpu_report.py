"""The stages of `make gpu` with commands that pass, fail, hang or are not there."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import gpu_report, runner
from benchmarks.gpu_report import main
from benchmarks.provenance import ROOT
from benchmarks.stages import KERNEL_NAMES, PICKED, SECONDS, Stage, seconds_of, stages


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
print("==== 1 failed, 690 passed, 30 skipped in 28.95s ====")
raise SystemExit(1)
"""
    planned = [stage("suite", code)]
    assert main(["--out", str(tmp_path)], planned) == 1
    text = (tmp_path / "summary.md").read_text()
    assert "| 1 failed, 690 passed, 30 skipped in 28.95s |" in text
    assert "Failed in suite: tests/kernels/test_gram.py::test_dense_rows[cuda-2-1]" in text


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
        "build", "device tests", "step benchmarks", "kernel benchmarks", "gpu tests", "cuda suite", "triton suite",
        "other suite", "memcheck", "racecheck",
    ]  # fmt: skip
    build = found["build"].environment
    assert (build["MTL_KERNELS_CUDA_ARCHS"], build["MTL_KERNELS_CUDA"]) == ("native", "1")
    assert "{seconds}" in found["kernel benchmarks"].command and found["kernel benchmarks"].grace == 20
    assert all("--device" in found[name].command for name in found if name.endswith("suite"))
    uncached = [each.name for each in found.values() if "PYTORCH_NO_CUDA_MEMORY_CACHING" in each.environment]
    assert uncached == ["memcheck"]
    for tool in ("memcheck", "racecheck"):
        command = found[tool].command
        assert command[command.index("--kernel-name") + 1] == f"kns={KERNEL_NAMES}" and len(found[tool].must_print) == 2
    tests = [each for each in found.values() if "pytest" in each.command]
    assert len(tests) == 7 and all(re.search(each.must_print[-1], "12 passed, 3 skipped in 1.2s") for each in tests)
    assert not any(re.search(each.must_print[-1], "8 skipped in 0.03s") for each in tests)
    written = {word for each in found.values() for word in each.command if word.startswith("--junitxml")}
    assert len(written) + len(("summary.md", "gpu.log", "card.csv", "card.png", "card-steps.csv")) <= 8


def test_the_limits_add_up(tmp_path: Path) -> None:
    planned = stages(tmp_path, 16)
    phases = {each.phase: [other for other in planned if other.phase == each.phase] for each in planned}
    assert sum(map(seconds_of, phases.values())) <= SECONDS <= 470
    alone = [each for each in planned if each.name in ("device tests", "step benchmarks", "kernel benchmarks")]
    assert all(phases[each.phase] == [each] for each in alone), "nothing else runs while these measure"
    assert [each.name for each in planned if each.stretches] == ["kernel benchmarks"]
    assert phases[max(phases)][0].name == "gpu tests" and len(phases[max(phases)]) == 6


@pytest.fixture(scope="module")
def collected() -> list[str]:
    """The names of all tests of the kernels, with the reference for the cuda backend, which has the same ones."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/kernels",
               "-m", "not gpu", "-k", "reference"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [text.split("::")[1].replace("reference", "cuda") for text in done.stdout.splitlines() if "::" in text]


def test_every_name_that_is_picked_for_the_sanitizer_is_a_test(collected: list[str]) -> None:
    for alternative in PICKED:
        words = alternative.split(" and ")
        assert any(all(word in name for word in words) for name in collected), alternative
    picked = [n for n in collected if any(all(word in n for word in each.split(" and ")) for each in PICKED)]
    assert 100 < len(picked) < 250


def test_the_sanitizer_runs_every_kernel(collected: list[str]) -> None:
    """By number of tasks and dtype: where csrc/cuda picks another kernel."""
    picked = [n for n in collected if any(all(word in n for word in each.split(" and ")) for each in PICKED)]
    dense = {(int(name.split("-")[1]), name.split("-")[3]) for name in picked if name.startswith("test_dense_rows")}
    for low, high in ((3, 4), (9, 16), (17, 32), (33, 48), (49, 64), (65, 128)):
        dtypes = {dtype for tasks, dtype in dense if low <= tasks <= high}
        assert len(dtypes) == 4, f"gram of {low} to {high} rows: {dtypes}"
    mixed = {name for name in picked if name.startswith("test_ragged_table_of_mixed_dtypes")}
    assert {f"test_ragged_table_of_mixed_dtypes[cuda-{tasks}]" for tasks in (2, 8)} <= mixed
    casts = {name for name in picked if name.startswith("test_cast_scale_and_accumulate")}
    assert len(casts) == 32, "from four dtypes to four, with and without accumulating"
    solved = {name for name in picked if name.startswith(("test_backends_agree[", "test_backends_agree_on"))}
    assert {int(name.split("-")[1].rstrip("]")) for name in solved} >= {5, 40, 128} and len(solved) >= 6


def test_the_names_of_our_kernels_hold_what_the_sanitizer_looks_for() -> None:
    module = next((ROOT / "mtl_kernels").glob("_cuda*.so"), None)
    if module is None:
        pytest.skip("mtl_kernels._cuda was not built")
    names = re.findall(rb"_ZN\w*(?:gram_triangle|gram_tensor|combine|solve_batch)\w*Args\w*", module.read_bytes())
    assert names and all(KERNEL_NAMES.encode() in name for name in names)
