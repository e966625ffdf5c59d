"""The GPU benchmark, run on the CPU: what it plans, checks and writes does not depend on the device."""

import csv
import math
import time
from pathlib import Path

import pytest
import torch

import mtl_kernels as mk
from benchmarks import cases, checks, counts, device, gpu, results
from benchmarks.bench import Bench, Record
from benchmarks.device import Host
from benchmarks.isolate import Attempts
from benchmarks.plan import (
    GPU_KERNELS,
    GPU_TASKS,
    Case,
    gpu_budget,
    gpu_expected,
    gpu_kernels,
    gpu_plan,
    has_budget,
)
from benchmarks.providers import SOLVERS, Provider, backend_of, make_weights, our_backends, providers
from benchmarks.results import OURS, Row, compare

CPU = torch.device("cpu")


class Run(Bench):
    """A bench in the process that keeps the rows."""

    def __init__(self, tmp_path: Path, seconds: float = 60.0) -> None:
        self.record = Record(tmp_path, results.environment("here"))
        super().__init__(Host(), Attempts(self.record.take), time.monotonic() + seconds, 2)

    def noted(self, *measures: str) -> list[Row]:
        return self.record.noted(*measures)


def stored(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_the_plan_covers_every_size() -> None:
    sizes = gpu_plan(int(2e10))
    assert len(sizes) == len(set(sizes)) == 2 * 5 * len(GPU_TASKS)
    assert {n for _, n, _ in sizes} >= {10_000, 1_000_000, 10_000_000, 100_000_000, 500_000_000}
    assert [n for _, n, _ in sizes[:12]] == [100_000_000] * 12
    budgets = [has_budget(rows) for rows in sizes]
    assert budgets == sorted(budgets, reverse=True), "the sizes with a budget come first"
    assert sum(budgets) == 2 * (2 * len(GPU_TASKS) - 1) + 2 * 3, "1e8 but for K = 128, 1e4, and 1e9 / K for K <= 8"
    assert max(k * n for k, n, _ in sizes) == 12_800_000_000
    assert all(n % 16 == 0 for _, n, _ in sizes), "every row begins at an address that 16 bytes divide"
    assert set(gpu_kernels(10_000)) == set(GPU_KERNELS) and set(gpu_kernels(500_000_000)) == {"gram", "combine"}


def test_what_must_not_be_missing() -> None:
    found = {(case.kernel, what) for case, what in gpu_expected([(8, 10**8, torch.float32), (8, 10**4, torch.float32)])}
    steps = {(step, what) for step in ("pcgrad_step", "mgda_step") for what in ("kernel", "latency")}
    assert found == {("gram", "kernel"), ("combine", "kernel"), *steps}
    assert not list(gpu_expected([(8, 10**6, torch.float32), (128, 10**8, torch.float32)]))


def test_the_largest_rows_fit_an_h100() -> None:
    largest = max(gpu_plan(int(2e10)), key=lambda rows: rows[0] * rows[1] * rows[2].itemsize)
    case = Case("all", *largest)
    assert case.row_bytes == 51_200_000_000
    assert cases.needed_bytes(case, 1) < 0.8 * (78 << 30)


@pytest.mark.parametrize("num_tasks", [2, 3, 16, 128])
def test_weights_are_of_every_kind(num_tasks: int) -> None:
    weights = make_weights(num_tasks, CPU)
    assert weights.min() < 0 < weights.max() and bool((weights == 0).any()) == (num_tasks > 2)
    assert torch.equal(weights.bfloat16().double(), weights)


@pytest.mark.parametrize(("num_tasks", "share"), [(2, 0.9), (16, 0.9), (64, 0.75), (40, 0.825), (128, None)])
def test_budgets_are_shares_of_a_copy(num_tasks: int, share: float | None) -> None:
    for kernel in ("gram", "combine"):
        found = gpu_budget(Case(kernel, num_tasks, 100_000_000, torch.bfloat16), "graph")
        assert found == (None if share is None else pytest.approx(1 / share))
        assert gpu_budget(Case(kernel, num_tasks, 1_000_000, torch.bfloat16), "graph") is None
    step = Case("pcgrad_step", num_tasks, 10_000, torch.float32)
    assert [gpu_budget(step, measure) for measure in ("graph", "call", "latency")] == [30, None, 60]


def test_the_exact_gram_of_any_shape() -> None:
    for shape in ((3, 5), (2, 64), (4, 1000), (1, 129)):
        rows = torch.randn(*shape)
        torch.testing.assert_close(checks.exact_gram(rows), rows.double() @ rows.double().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", GPU_KERNELS)
def test_every_provider_is_right_and_a_wrong_one_is_seen(kernel: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(kernel, 4, 5000, dtype)
    inputs = cases.make_inputs(4, 5000, dtype, 2, Host())
    exact = checks.exact_gram(inputs[0].rows)
    found = providers(case, exact, torch.device("cpu"))
    assert found[0].name == OURS and len({provider.name for provider in found}) == len(found)
    for provider in found:
        rows = cases.measure_provider(Run(tmp_path), case, provider, inputs, 3, 1e-6)
        assert all(row.correct for row in rows), f"{provider.name}: {rows[0].error}"
        if provider.capturable:
            assert rows[0].ratio and rows[0].gb_per_s
        else:
            assert [row.measure for row in rows] == ["latency"], "the time of a loop that waits is not one of kernels"
        assert all(bool(row.backend) == provider.name.startswith(OURS) for row in rows)
    right = found[0]
    wrong = Provider("wrong", right.make, lambda _: math.nan, right.limit)
    rows = cases.measure_provider(Run(tmp_path), case, wrong, inputs, 3, 1e-6)
    assert not any(row.correct or row.ratio for row in rows)


def test_an_output_that_was_not_written_is_seen() -> None:
    case = Case("combine", 3, 4000, torch.float32)
    inputs = cases.make_inputs(3, 4000, torch.float32, 1, Host())[0]
    provider = providers(case, checks.exact_gram(inputs.rows), torch.device("cpu"))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mk, "combine", lambda *args, **kwargs: None)
        assert provider.error(inputs) == math.inf


@pytest.mark.parametrize("kernel", SOLVERS)
def test_solvers(kernel: str, tmp_path: Path) -> None:
    one = Run(tmp_path)
    for batch in (1, 3):
        cases.measure_solver(one, kernel, 4, batch)
    ours = [row for row in one.rows if row.provider == OURS]
    assert {(row.measure, row.batch) for row in ours} == {(m, b) for m in ("clock", "call", "latency") for b in (1, 3)}
    assert all(row.correct for row in ours) and not one.noted("failed")


def test_a_failing_provider_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gram(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(mk, "gram", no_gram)
    monkeypatch.setattr(cases, "gpu_kernels", lambda _: ("gram",))
    one = Run(tmp_path)
    cases.measure_rows(one, 2, 20_000, torch.float32)
    failed = one.noted("failed")
    assert failed[0].provider == OURS and failed[0].note == "RuntimeError: out of order"
    assert {row.provider for row in one.rows} >= {"torch copy_", "torch.mm"}
    assert any("out of order" in fault for fault in gpu.faults(one.rows, on_gpu=False))
    rows = stored(one.record.path)
    assert any(row["note"] == "RuntimeError: out of order" and not row["median_us"] for row in rows)


def test_no_memory_for_a_size_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(bench: Bench, num_tasks: int, num_columns: int, dtype: torch.dtype) -> None:
        if num_columns == 10**8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 47 GiB")
        done.append(num_columns)

    done: list[int] = []
    monkeypatch.setattr(gpu, "measure_rows", full)
    monkeypatch.setattr(gpu, "SOLVERS", {})
    one = Run(tmp_path)
    gpu.measure_all(one, [(2, 10**8, torch.float32), (2, 10**6, torch.float32)], [2])
    assert done == [10**6] and "out of memory" in one.noted("failed")[0].note
    gpu.note_missing(one.record, [(2, 10**8, torch.float32)], on_gpu=False)
    assert {row.kernel for row in one.noted("missing")} == {"gram", "combine"}
    one.record.too_large.add((2, 10**8, torch.float32))
    one.record.rows.clear()
    gpu.note_missing(one.record, [(2, 10**8, torch.float32)], on_gpu=False)
    assert not one.record.rows, "what the device has no memory for is left out, not missing"


@pytest.mark.parametrize("total", [1 << 30, 80 << 30])
def test_memory_that_something_holds_is_no_excuse(tmp_path: Path, total: int) -> None:
    one = Run(tmp_path)
    names = {"device": torch.device("cuda"), "memory_bytes": total, "free_bytes": lambda self: 1 << 29}
    one.where = type("Gpu", (Host,), names)()
    cases.measure_rows(one, 2, 10**8, torch.float32)
    assert one.noted("left out")[0].note.endswith("GB are free")
    assert bool(one.record.too_large) == (total == 1 << 30)


def test_when_the_time_is_up_nothing_more_begins(tmp_path: Path) -> None:
    one = Run(tmp_path, seconds=0)
    cases.measure_rows(one, 2, 20_000, torch.float32)
    assert one.rows[0].provider == "torch copy_"
    left_out = one.noted("left out")
    assert [row.kernel for row in left_out] == list(gpu_kernels(20_000)) and left_out[0].note == "no time left"


def test_times_of_different_kinds_are_not_compared() -> None:
    times = ((OURS, 2.0, "graph"), (OURS, 10.0, "latency"), ("x", 6.0, "events"), ("x", 5.0, "latency"))
    rows = [
        Row("gram", name, 2, 10, "float32", us, us, us, measure=measure, correct=True) for name, us, measure in times
    ]
    compare(rows)
    assert [row.times_ours for row in rows] == [None, None, None, 0.5], "events of a loop hold the host's time as well"


def test_the_published_loops_are_compared_by_their_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "gpu_kernels", lambda _: ("pcgrad_step", "mgda_step"))
    one = Run(tmp_path)
    cases.measure_rows(one, 2, 20_000, torch.float32)
    loops = [row for row in one.rows if row.provider in ("torch PCGrad loop", "torch frank_wolfe loop")]
    assert len(loops) == 2 and all(row.measure == "latency" and row.times_ours for row in loops)


@pytest.mark.exhaustive
def test_a_whole_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--tasks", "2", "--max-elements", "2e4", "--repeats", "1", "--seconds", "30"]
    assert gpu.main([*arguments, "--output", str(tmp_path), "--machine", "here"]) == 0
    found = stored(tmp_path / "here.csv")
    assert {row["kernel"] for row in found} >= {"copy", "gram"}
    assert all(row["machine"] == "here" and row["commit"] and row["date"] for row in found)
    assert {row["backend"] for row in found if row["provider"] == OURS and row["median_us"]} == {backend_of(OURS, CPU)}
    assert (tmp_path / "here.png").stat().st_size > 1000
    assert "of copy" in capsys.readouterr().out


def test_what_fails_the_run() -> None:
    rows = [
        Row("gram", name, 2, 10, "float32", 1.0, 1.0, 1.0, measure="graph", correct=correct, error=1.0, backend=backend)
        for name, correct, backend in (
            (OURS, True, "cuda"),
            (f"{OURS} triton", True, "triton"),
            ("torch.mm", False, ""),
        )
    ]
    rows[0].within_budget = False
    assert not gpu.faults(rows, on_gpu=True), "neither torch's errors nor a budget that is missed"
    rows[1].correct = False
    assert len(gpu.faults(rows, on_gpu=True)) == 1, "every backend of ours"
    rows[0].backend = "triton"
    assert "the backend triton, not cuda" in gpu.faults(rows, on_gpu=True)[0]


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--device", "tpu"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            gpu.parse(arguments)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            device.find("cuda")


def test_other_backends_only_where_they_are_affordable() -> None:
    assert our_backends(Case("gram", 4, 1000, torch.float32), CPU)[OURS] is None
    assert "mtl-kernels reference" in our_backends(Case("gram", 4, 1000, torch.float32), CPU)
    assert "mtl-kernels reference" not in our_backends(Case("gram", 4, 1 << 30, torch.float32), CPU)
    assert backend_of("mtl-kernels triton", CPU) == "triton" and backend_of("torch.mm", CPU) == ""


def test_counts_come_from_a_process_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Run(tmp_path)
    counts.measure_counts(one)
    assert not one.rows, "on a CPU there is nothing to count, and nothing fails"
    counts.add_counts(one, "gram", kernels=1, copies=0, syncs=0)
    counts.add_counts(one, "combine", kernels=1, copies=0, syncs=1)
    assert [row.within_budget for row in one.rows] == [True, False]
    monkeypatch.setattr(counts.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="no output"):
        counts.measure_counts(one)
