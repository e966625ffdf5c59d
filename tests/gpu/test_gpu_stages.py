"""What `make gpu` plans to run: every kernel in the first tests, each test in one suite, all of it in its time."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import passes
from benchmarks.networks import NETWORKS
from benchmarks.picks import PICKED, SHARED
from benchmarks.provenance import ROOT
from benchmarks.stages import KERNEL_NAMES, SECONDS, SUITE, Plan, Stage, seconds_of

SUITES = ("triton suite", "cuda suite", "other suite")


@pytest.fixture(scope="module")
def planned() -> dict[str, Stage]:
    return {stage.name: stage for stage in Plan(Path("out"), Path("scratch"), 16).stages()}


def test_what_make_gpu_runs(planned: dict[str, Stage]) -> None:
    assert list(planned) == [
        "cpu build", "build", "triton suite", "first tests", "device tests", "step benchmarks", "pass benchmarks",
        "kernel benchmarks", "cuda suite", "other suite", "gpu tests", "memcheck", "racecheck",
    ]  # fmt: skip
    build = planned["build"].environment
    assert (build["MTL_KERNELS_CUDA_ARCHS"], build["MTL_KERNELS_CUDA"]) == ("native", "1")
    assert all("{seconds}" in planned[f"{name} benchmarks"].command for name in ("pass", "kernel"))
    assert planned["kernel benchmarks"].grace == 15
    uncached = [each.name for each in planned.values() if "PYTORCH_NO_CUDA_MEMORY_CACHING" in each.environment]
    assert uncached == ["memcheck"]
    tests = [each for each in planned.values() if "pytest" in each.command or SUITE in each.command]
    assert len(tests) == 8 and all(re.search(each.must_print[-1], "12 passed, 3 skipped in 1.2s") for each in tests)
    assert not any(re.search(each.must_print[-1], "8 skipped in 0.03s") for each in tests)
    for tool in ("memcheck", "racecheck"):
        command = planned[tool].command
        under = command[command.index("--under") + 1]
        assert f"--kernel-name kns={KERNEL_NAMES}" in under and f"--tool {tool}" in under
        assert command[command.index("--must-print") + 1].endswith((": 0 errors", ": 0 hazards"))


def test_the_limits_add_up(planned: dict[str, Stage]) -> None:
    phases: dict[int, list[Stage]] = {}
    for stage in planned.values():
        phases.setdefault(stage.phase, []).append(stage)
    names = [[stage.name for stage in phases[phase]] for phase in sorted(phases)]
    assert sum(map(seconds_of, phases.values())) <= SECONDS <= 465
    assert names[:3] == [["cpu build"], ["build", "triton suite"], ["first tests"]], "before anything is measured"
    alone = ["device tests", "step benchmarks", "pass benchmarks", "kernel benchmarks"]
    assert names[3:7] == [[name] for name in alone]
    assert names[7:] == [["cuda suite", "other suite", "gpu tests"], ["memcheck", "racecheck"]]
    assert planned["first tests"].limit <= 60 and planned["first tests"].doubt
    assert [each.name for each in planned.values() if each.stretches] == ["kernel benchmarks", "memcheck", "racecheck"]


@pytest.mark.parametrize("jobs", [1, 16])
def test_processes_do_not_outnumber_the_cores(jobs: int) -> None:
    found = Plan(Path("out"), Path("scratch"), jobs).stages()
    for phase in {stage.phase for stage in found}:
        asked = [s.command[s.command.index("--jobs") + 1] for s in found if s.phase == phase and SUITE in s.command]
        assert sum(map(int, asked)) <= max(jobs, len(asked))


@pytest.fixture(scope="module")
def tests(planned: dict[str, Stage]) -> dict[str, list[str]]:
    """The names of the tests that a stage runs where there is a GPU."""
    chosen = [planned[name] for name in (*SUITES, "first tests", "gpu tests", "memcheck", "racecheck")]
    asked = {stage.name: stage.command[stage.command.index("--") + 1 :] for stage in chosen}
    script = Path(__file__).with_name("list_tests.py")
    done = subprocess.run([sys.executable, script], input=json.dumps(asked), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.exhaustive
def test_every_test_of_the_kernels_is_in_one_suite(tests: dict[str, list[str]]) -> None:
    found = [name for suite in SUITES for name in tests[suite]]
    assert len(found) == len(set(found))
    assert len(tests["cuda suite"]) > 700 and len(tests["triton suite"]) > 700
    assert all("cuda" in name for name in tests["cuda suite"])
    assert {name.split("[")[0] for name in tests["gpu tests"]} >= {
        "tests/kernels/test_cuda.py::test_launches_inside_a_graph",
        "tests/optim/test_cuda_graphs.py::test_replays_equal_eager_steps",
    }


@pytest.mark.parametrize(("stage", "picks"), [("memcheck", PICKED), ("racecheck", SHARED)])
def test_every_name_that_is_picked_is_a_test(stage: str, picks: tuple[str, ...], tests: dict[str, list[str]]) -> None:
    for alternative in picks:
        words = alternative.split(" and ")
        assert any(all(word in name for word in words) for name in tests[stage]), alternative


def test_the_sanitizers_see_fewer_tests(tests: dict[str, list[str]]) -> None:
    assert set(tests["racecheck"]) < set(tests["memcheck"]) < set(tests["first tests"])
    assert len(tests["racecheck"]) <= 60 and 100 < len(tests["memcheck"]) < 250 < len(tests["first tests"]) < 400
    assert all("cuda" in name for name in tests["memcheck"])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_first_tests_run_every_kernel(backend: str, tests: dict[str, list[str]]) -> None:
    """By number of tasks and dtype: where another kernel is picked."""
    picked = [name.split("::")[1] for name in tests["first tests"] if f"[{backend}" in name]
    dense = {(int(name.split("-")[1]), name.split("-")[3]) for name in picked if name.startswith("test_dense_rows")}
    for low, high in ((3, 4), (5, 6), (9, 16), (17, 32), (33, 48), (49, 64), (65, 128)):
        dtypes = {dtype for tasks, dtype in dense if low <= tasks <= high}
        assert len(dtypes) == 4, f"gram of {low} to {high} rows: {dtypes}"
    mixed = {name for name in picked if name.startswith("test_ragged_table_of_mixed_dtypes")}
    assert {f"test_ragged_table_of_mixed_dtypes[{backend}-{tasks}]" for tasks in (2, 8)} <= mixed
    casts = {name for name in picked if name.startswith("test_cast_scale_and_accumulate")}
    assert len(casts) == 32, "from four dtypes to four, with and without accumulating"
    solved = {name for name in picked if name.startswith(("test_backends_agree[", "test_backends_agree_on"))}
    sizes = {int(size) for name in solved for size in re.findall(r"-(\d+)(?=[-\]])", name)}
    assert sizes >= {5, 40, 128} and len(solved) >= 6


def test_racecheck_sees_every_kernel_with_shared_memory(tests: dict[str, list[str]]) -> None:
    dense = {
        (int(name.split("-")[1]), name.split("-")[3].rstrip("]")) for name in tests["racecheck"] if "dense" in name
    }
    assert {tasks for tasks, _ in dense} == {9, 17, 33, 64, 128}
    assert {dtype for _, dtype in dense} == {"torch.float32", "torch.bfloat16"}
    for word in ("test_gram.py::test_ragged", "test_combine.py::test_ragged", "gram_solve", "groups_split", "agree"):
        assert any(word in name for name in tests["racecheck"]), word


def test_the_names_of_our_kernels_hold_what_the_sanitizer_looks_for() -> None:
    module = next((ROOT / "mtl_kernels").glob("_cuda*.so"), None)
    if module is None:
        pytest.skip("mtl_kernels._cuda was not built")
    found = re.findall(rb"_ZN\w*(?:gram_triangle|gram_tensor|combine|solve_batch)\w*Args\w*", module.read_bytes())
    assert found and all(KERNEL_NAMES.encode() in name for name in found)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_options_of_the_passes_are_known(device: str) -> None:
    planned = {stage.name: stage for stage in Plan(Path("out"), Path("scratch"), 16, device).stages()}
    command = planned["pass benchmarks"].command
    given = [word.replace("{seconds}", "25") for word in command[command.index("benchmarks/passes.py") + 1 :]]
    options = passes.parse(given)
    assert options.device == device and options.seconds == 25 and set(options.networks) <= set(NETWORKS)


def test_a_dry_run_plans_the_same_stages(planned: dict[str, Stage]) -> None:
    dry = Plan(Path("out"), Path("scratch"), 16, "cpu").stages()
    assert [(each.name, each.phase, each.limit) for each in dry] == [
        (each.name, each.phase, each.limit) for each in planned.values()
    ]
    assert not any("cuda" in each.command for each in dry if not each.skipped)
