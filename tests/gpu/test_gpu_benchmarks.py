"""The GPU benchmark, run on the CPU: what it plans, checks and writes does not depend on the device."""

import csv
import math
from pathlib import Path

import pytest
import torch

import mtl_kernels as mk
from benchmarks import checks, device, gpu, results, steps
from benchmarks.device import Counts, Host, counts_of
from benchmarks.plan import GPU_KERNELS, GPU_TASKS, Case, gpu_budget, gpu_kernels, gpu_plan
from benchmarks.providers import SOLVERS, Provider, our_backends, providers
from benchmarks.results import OURS, Row, compare
from mtl_optim import PCGrad


def bench(tmp_path: Path, seconds: float = 60.0) -> gpu.Bench:
    return gpu.Bench(Host(), seconds, 2, tmp_path / "x.csv", results.environment("here"))


def test_the_plan_covers_every_size() -> None:
    sizes = gpu_plan(int(2e10))
    assert len(sizes) == len(set(sizes)) == 2 * 5 * len(GPU_TASKS)
    assert {n for _, n, _ in sizes} >= {10_000, 1_000_000, 10_000_000, 100_000_000, 500_000_000}
    assert [n for _, n, _ in sizes[:14]] == [100_000_000] * 14, "the sizes with a budget come first"
    assert max(k * n for k, n, _ in sizes) == 12_800_000_000
    assert all(n % 16 == 0 for _, n, _ in sizes), "every row begins at an address that 16 bytes divide"
    assert set(gpu_kernels(10_000)) == set(GPU_KERNELS)


@pytest.mark.parametrize(("num_tasks", "share"), [(2, 0.9), (16, 0.9), (64, 0.75), (40, 0.825), (128, None)])
def test_budgets_are_shares_of_a_copy(num_tasks: int, share: float | None) -> None:
    for kernel in ("gram", "combine"):
        found = gpu_budget(Case(kernel, num_tasks, 100_000_000, torch.bfloat16), "graph")
        assert found == (None if share is None else pytest.approx(1 / share))
        assert gpu_budget(Case(kernel, num_tasks, 1_000_000, torch.bfloat16), "graph") is None
    assert gpu_budget(Case("pcgrad_step", num_tasks, 10_000, torch.float32), "latency") == 30


def test_the_exact_gram_of_any_shape() -> None:
    for shape in ((3, 5), (2, 64), (4, 1000), (1, 129)):
        rows = torch.randn(*shape)
        torch.testing.assert_close(checks.exact_gram(rows), rows.double() @ rows.double().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", GPU_KERNELS)
def test_every_provider_is_right_and_a_wrong_one_is_seen(kernel: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(kernel, 4, 5000, dtype)
    inputs = gpu.make_inputs(4, 5000, dtype, 2, Host())
    exact = checks.exact_gram(inputs[0].rows)
    found = providers(case, exact, torch.device("cpu"))
    assert found[0].name == OURS and len({provider.name for provider in found}) == len(found)
    for provider in found:
        rows = gpu.measure_provider(bench(tmp_path), case, provider, inputs, 3, 1e-6)
        assert all(row.correct for row in rows), f"{provider.name}: {rows[0].error}"
        assert rows[0].ratio and rows[0].gb_per_s
    right = found[0]
    wrong = Provider("wrong", right.make, lambda _: math.nan, right.limit)
    rows = gpu.measure_provider(bench(tmp_path), case, wrong, inputs, 3, 1e-6)
    assert not any(row.correct or row.ratio for row in rows)


def test_an_output_that_was_not_written_is_seen() -> None:
    case = Case("combine", 3, 4000, torch.float32)
    inputs = gpu.make_inputs(3, 4000, torch.float32, 1, Host())[0]
    provider = providers(case, checks.exact_gram(inputs.rows), torch.device("cpu"))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mk, "combine", lambda *args, **kwargs: None)
        assert provider.error(inputs) == math.inf


@pytest.mark.parametrize("kernel", SOLVERS)
def test_solvers(kernel: str, tmp_path: Path) -> None:
    one = bench(tmp_path)
    for batch in (1, 3):
        gpu.measure_solver(one, kernel, 4, batch)
    ours = [row for row in one.rows if row.provider == OURS]
    assert {(row.measure, row.batch) for row in ours} == {(m, b) for m in ("clock", "call", "latency") for b in (1, 3)}
    assert all(row.correct for row in ours) and not one.failures


def test_a_failing_provider_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gram(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(mk, "gram", no_gram)
    monkeypatch.setattr(gpu, "gpu_kernels", lambda _: ("gram",))
    one = bench(tmp_path)
    gpu.measure_rows(one, 2, 20_000, torch.float32)
    assert any("out of order" in failure for failure in one.failures)
    assert {row.provider for row in one.rows} >= {"torch copy_", "torch.mm"}


def test_when_the_time_is_up_nothing_more_begins(tmp_path: Path) -> None:
    one = bench(tmp_path, seconds=0)
    gpu.measure_rows(one, 2, 20_000, torch.float32)
    assert {row.provider for row in one.rows} == {"torch copy_"}
    assert len(one.left_out) == len(GPU_KERNELS) and "no time left" in one.left_out[0]


def test_times_of_different_kinds_are_not_compared() -> None:
    rows = [
        Row("gram", name, 2, 10, "float32", us, us, us, measure=measure, correct=True)
        for name, us, measure in ((OURS, 2.0, "graph"), (OURS, 10.0, "call"), ("x", 6.0, "events"), ("x", 5.0, "call"))
    ]
    compare(rows)
    assert [row.times_ours for row in rows] == [None, None, 3.0, 0.5]


def test_a_whole_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--tasks", "2", "--max-elements", "2e4", "--repeats", "1", "--seconds", "3"]
    assert gpu.main([*arguments, "--output", str(tmp_path), "--machine", "here"]) == 0
    stored = list(csv.DictReader((tmp_path / "here.csv").open()))
    assert {row["kernel"] for row in stored} >= {"copy", "gram"}
    assert all(row["machine"] == "here" and row["commit"] and row["date"] for row in stored)
    assert (tmp_path / "here.png").stat().st_size > 1000
    assert "of copy" in capsys.readouterr().out


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--device", "tpu"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            gpu.parse(arguments)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            device.find("cuda")


def test_other_backends_only_where_they_are_affordable() -> None:
    cpu = torch.device("cpu")
    assert our_backends(Case("gram", 4, 1000, torch.float32), cpu)[OURS] is None
    assert "mtl-kernels reference" in our_backends(Case("gram", 4, 1000, torch.float32), cpu)
    assert "mtl-kernels reference" not in our_backends(Case("gram", 4, 1 << 30, torch.float32), cpu)


def trace(*events: tuple[str, str, float]) -> list[dict[str, object]]:
    label: dict[str, object] = {"cat": "user_annotation", "name": "counted call", "ts": 100.0, "dur": 50.0}
    on_device = {"cat": "gpu_user_annotation", "name": "counted call", "ts": 120.0, "dur": 90.0}
    return [{"ph": "M"}, on_device, label, *({"cat": c, "name": n, "ts": t, "dur": 1.0} for c, n, t in events)]


def test_counting_the_events_of_a_trace() -> None:
    found = counts_of(
        trace(
            ("cuda_runtime", "cudaDeviceSynchronize", 10.0),
            ("cuda_runtime", "cudaLaunchKernel", 101.0),
            ("cuda_driver", "cuLaunchKernelEx", 102.0),
            ("cuda_runtime", "cudaStreamSynchronize", 110.0),
            ("cuda_runtime", "cudaStreamWaitEvent", 111.0),
            ("cuda_runtime", "cudaMemcpyAsync", 112.0),
            ("cuda_runtime", "cudaMemcpy", 113.0),
            ("kernel", "gram", 130.0),
            ("kernel", "combine", 160.0),
            ("gpu_memcpy", "Memcpy DtoH", 170.0),
            ("gpu_memset", "Memset", 171.0),
            ("cuda_runtime", "cudaDeviceSynchronize", 151.0),
        )
    )
    assert found == Counts(kernels=2, copies=2, syncs=2)
    assert counts_of(trace()) == Counts(0, 0, 0)


def test_the_twin_of_the_device() -> None:
    where = Host()
    seen: list[int] = []
    timing, how = where.kernel_time([lambda: seen.append(0), lambda: seen.append(1)], 3, True)
    assert seen == [0, 1] * 3 and how == "clock" and timing.p20 <= timing.median <= timing.p80
    stop = where.stopwatch()
    assert 0 <= stop()() < 60
    assert where.count(lambda: seen.append(3), before=lambda: seen.append(2)) is None and seen[-2:] == [2, 3]
    assert where.free_bytes() > 0 and where.call_time(lambda: None, 2).median >= 0


def test_the_calls_that_are_counted_run() -> None:
    for call, _ in gpu.counted_calls(Host()).values():
        call()


def test_the_steps_of_a_workload_are_counted() -> None:
    workload = steps.Workload(2, PCGrad())
    assert workload.counts() is None
    assert workload.optimizer.report is not None
