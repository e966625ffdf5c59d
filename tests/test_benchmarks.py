"""What the benchmarks plan, check, judge and write; nothing here depends on how fast anything ran."""

import csv
import itertools
import random
import sys
from pathlib import Path

import pytest
import torch

import mtl_kernels as mk
from mtl_optim import MGDA, Method, PCGrad, get_method, list_methods

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import checks, kernels, networks, passes, peers, plots, provenance, results, solvers, steps
from benchmarks.plan import KERNELS, STREAMING_BYTES, TASKS, Case, budget, plan, sizes
from benchmarks.results import OURS, Row, cells, compare, judge
from benchmarks.timing import Effort, measure, summarize

BRIEF = Effort(repeats=2, min_repeats=2, min_time=0.0, case_time=0.0)


def row(provider: str = OURS, median_us: float = 20.0, **columns: object) -> Row:
    return Row("gram", provider, 2, 1000, "float32", median_us, median_us, median_us, **columns)  # type: ignore[arg-type]


def test_sizes_go_up_in_decades_to_the_largest() -> None:
    assert sizes(2, 4, 400_000_000) == [1000, 10_000, 100_000, 1_000_000, 10_000_000, 50_000_000]
    assert sizes(64, 4, 400_000_000)[-1] == 1_562_500
    assert sizes(64, 4, 1000) == []


def test_the_plan_covers_every_kernel_and_number_of_tasks() -> None:
    cases = list(plan(KERNELS, 400_000_000, quick=False))
    assert {(c.kernel, c.num_tasks) for c in cases} == set(itertools.product(KERNELS, TASKS))
    assert len(cases) == len(set(cases))
    assert all(c.row_bytes <= 400_000_000 for c in cases)
    assert {c.dtype for c in cases if c.kernel == "gram"} == {torch.float32, torch.bfloat16}
    quick = list(plan(["gram"], 40_000_000, quick=True))
    assert {c.kernel for c in quick} == {"gram"} and len(quick) < 10
    assert {c.dtype for c in quick} == {torch.float32, torch.bfloat16}, "every table of docs/measured.md has rows"


@pytest.mark.parametrize(
    ("kernel", "num_tasks", "expected"),
    [("gram", 2, 1.10), ("gram", 6, 1.10), ("gram", 8, 1.15), ("gram", 16, 1.3), ("gram", 32, 1.8),
     ("gram", 40, 1.975), ("gram", 64, 2.5), ("combine", 3, 1.1),
     ("combine", 64, 1.1), ("pcgrad_step", 8, None)],
)  # fmt: skip
def test_budgets_of_streaming_sizes(kernel: str, num_tasks: int, expected: float | None) -> None:
    large = Case(kernel, num_tasks, STREAMING_BYTES, torch.float32)
    assert budget(large) == (None if expected is None else pytest.approx(expected))
    assert budget(Case(kernel, num_tasks, 1000, torch.float32)) is None


def test_budgets_of_solvers() -> None:
    found = [budget(Case(s, k, 0, torch.float64)) for s in ("pcgrad", "min_norm") for k in (2, 8, 16, 40, 64)]
    assert found == [5, 5, 100, 100, None, 20, 20, 5000, 5000, None]


def test_every_method_with_a_solve_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {name for name, _ in solvers.cases([], [2])}
    assert {"pcgrad", "mgda", "sdmgrad", "modo", "krum"} <= measured
    for name in {info.name for info in list_methods()} - measured:
        with pytest.raises(TypeError, match="needs the rows"):
            get_method(name).solve(torch.eye(2, dtype=torch.float64))
    with pytest.raises(SystemExit):
        solvers.main(["graddrop"])
    assert "no solve to measure" in capsys.readouterr().err


def test_a_right_result_gets_its_ratio_and_verdict() -> None:
    good = judge(row(denominator_us=10.0), 1e-9, 1e-7, 1.5, budget_in_us=False)
    assert good.correct and good.ratio == 2 and good.within_budget is False
    solver = judge(row(), 0.0, 1e-10, 30.0, budget_in_us=True)
    assert solver.within_budget and solver.ratio is None
    rival = judge(row("torch", denominator_us=10.0), 1e-9, 1e-7, 1.5, budget_in_us=False)
    assert rival.ratio == 2 and rival.within_budget is None


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_a_wrong_result_gets_no_ratio_of_any_kind(error: float, tmp_path: Path) -> None:
    for wrong in ("torch", OURS):
        rows = [
            judge(row(name, denominator_us=10.0), error if name == wrong else 0.0, 1e-7, 3.0, budget_in_us=False)
            for name in (OURS, "torch")
        ]
        compare(rows)
        found = next(r for r in rows if r.provider == wrong)
        assert not found.correct and found.ratio is found.within_budget is None
        assert all(r.times_ours is None for r in rows)
        assert any("wrong" in cell for cell in cells(found))
        results.write_csv(rows, tmp_path / "x.csv")
        stored = next(r for r in csv.DictReader((tmp_path / "x.csv").open()) if r["provider"] == wrong)
        assert stored["ratio"] == stored["times_ours"] == stored["within_budget"] == "" and stored["correct"] == "False"


def test_percentiles() -> None:
    found = summarize([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (found.p20, found.median, found.p80) == (2.0, 3.5, 5.0)


def test_measure_calls_everything_in_turn() -> None:
    seen: list[str] = []
    found = measure({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, BRIEF)
    assert set(found) == {"a", "b"} and seen[-4:] == ["a", "b", "b", "a"]
    assert all(t.p20 <= t.median <= t.p80 for t in found.values())


@pytest.mark.parametrize(
    "case",
    [Case("gram", 3, 1000, torch.float32), Case("gram", 2, 1001, torch.bfloat16),
     Case("combine", 4, 999, torch.float32), Case("combine", 3, 1001, torch.bfloat16),
     Case("pcgrad", 5, 0, torch.float64), Case("min_norm", 5, 0, torch.float64),
     Case("pcgrad_step", 4, 5000, torch.float32), Case("mgda_step", 4, 5000, torch.float32)],
    ids=str,
)  # fmt: skip
def test_every_competitor_is_right(case: Case) -> None:
    rows = kernels.run_case(case, BRIEF, torch.Generator().manual_seed(0))
    assert rows[0].provider == OURS and len(rows) >= 2
    for found in rows:
        assert found.correct, f"{found.provider}: error {found.error}"
    if case.num_columns:
        assert all(found.ratio and found.gb_per_s and found.denominator for found in rows)


def test_the_checks_see_errors() -> None:
    rows = torch.randn(4, 300)
    exact = mk.reference.gram(rows)
    assert checks.gram_error(exact * (1 + 1e-5), exact) > checks.gram_limit(True, 4, torch.float32)
    weights = torch.ones(4, dtype=torch.float64)
    assert checks.combine_error(rows.sum(0) + 1e-3, rows, weights) > checks.combine_limit(False, 4, torch.float32)
    assert checks.min_norm_error(torch.full((4,), 0.25), exact) > 1e-9
    assert checks.min_norm_error(torch.ones(4), exact) == float("inf")
    assert checks.min_norm_error(torch.full((4,), torch.nan), exact) == float("inf")
    assert checks.min_norm_error(mk.min_norm_weights(exact).weights, exact) < 1e-9
    orders = [[0, 1, 2, 3]] * 4
    assert checks.direction_error(rows.sum(0), rows, checks.pcgrad_weights(exact, orders)) > 1e-3


def test_the_least_value_is_proven_whatever_the_solver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(5, 8, dtype=torch.float64)
    gram = rows @ rows.T
    weights, least = checks.min_norm_weights(gram)
    value = float(weights @ gram @ weights)
    assert least <= value <= least + 1e-12 * float(gram.diagonal().max())
    useless = mk.min_norm_weights(gram)._replace(weights=torch.full((5,), 0.2, dtype=torch.float64))
    monkeypatch.setattr(mk, "min_norm_weights", lambda gram: useless)
    assert checks.min_norm_weights(gram)[1] <= value and checks.min_norm_error(weights, gram) > 1e-9


def test_the_sample_has_both_ends() -> None:
    assert checks.sample(10).tolist() == list(range(10))
    found = checks.sample(1_000_000)
    assert {0, 1, 999_999, 999_998} <= set(found.tolist()) and found.numel() == checks.SAMPLE


def test_the_published_loops() -> None:
    rows = torch.randn(5, 40, dtype=torch.float64)
    random.seed(3)
    orders = peers.draw_orders(5)
    random.seed(3)
    torch.testing.assert_close(peers.pcgrad_loop(rows), checks.pcgrad_weights(rows @ rows.T, orders) @ rows)
    assert all(sorted(order) == list(range(5)) for order in orders)
    weights = peers.frank_wolfe_loop(rows @ rows.T)
    assert checks.min_norm_error(weights, rows @ rows.T) < 1e-2


def test_a_whole_run_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--quick",
        "--kernels",
        "gram",
        "--max-bytes",
        "8e4",
        "--output",
        str(tmp_path),
        "--machine",
        "here",
    ]
    assert kernels.main(arguments) == 0
    stored = list(csv.DictReader((tmp_path / "here-kernels.csv").open()))
    assert {r["kernel"] for r in stored} >= {"gram", "read", "write", "copy", "matmul"}
    ours = [r for r in stored if r["provider"] == OURS]
    assert ours and all(r["machine"] == "here" and r["commit"] and r["torch"] == torch.__version__ for r in ours)
    assert (tmp_path / "here-kernels.png").stat().st_size > 1000
    assert "mtl-kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--kernels", "nope"], ["--threads", "0"], ["--max-bytes", "5"], ["--max-bytes", "nan"]]
)
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.parse(arguments)
    assert "error" in capsys.readouterr().err


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.parse(["--help"])
    shown = capsys.readouterr().out
    for option in (
        "--quick",
        "--kernels",
        "--output",
        "--machine",
        "--threads",
        "--seed",
        "--max-bytes",
        "--all",
    ):
        assert option in shown


def test_the_commit_is_told_where_there_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "abc1234")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == "abc1234"
    monkeypatch.delenv("COMMIT")
    assert provenance.commit() == "unknown"


def test_rows_are_added_to_a_file(tmp_path: Path) -> None:
    results.write_csv([row()], tmp_path / "x.csv")
    results.write_csv([row("torch", median_us=float("nan"), error=float("nan"))], tmp_path / "x.csv", append=True)
    stored = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [r["provider"] for r in stored] == [OURS, "torch"]
    assert stored[1]["median_us"] == "" and stored[1]["error"] == "nan", "a row without a time, and one that is wrong"
    results.write_csv([row()], tmp_path / "x.csv")
    assert len(list(csv.DictReader((tmp_path / "x.csv").open()))) == 1


def run_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, str]], str]:
    arguments = ["--quick", "--tasks", "2", "--output", str(tmp_path), "--machine", "here"]
    status = steps.main(arguments)
    return status, list(csv.DictReader((tmp_path / "here-steps.csv").open())), capsys.readouterr().out


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.timing, "QUICK", BRIEF)


SMALL = "perceptron, 32"


def run_passes(tmp_path: Path, *modes: str) -> tuple[int, dict[str, dict[str, str]]]:
    threads = torch.get_num_threads()
    arguments = ["--tasks", "2", "--networks", SMALL, "--quick", "--no-memory", "--output", str(tmp_path)]
    try:
        status = passes.main([*arguments, "--machine", "here", *(["--modes", *modes] if modes else [])])
    finally:
        torch.set_num_threads(threads)
    return status, {row["mode"]: row for row in csv.DictReader((tmp_path / "here-passes.csv").open())}


def test_passes(tmp_path: Path, brief: None) -> None:
    status, found = run_passes(tmp_path)
    assert status == 0 and set(passes.MODES) - set(passes.PEERS) <= set(found)
    for mode in set(found) - set(passes.PEERS):
        row = found[mode]
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) < 1e5 and not row["note"]
        assert 0 < float(row["ratio_to_K_backwards"]) < 100 and not row["peak_mb"]
    assert float(found["K backwards"]["ratio_to_K_backwards"]) == 1
    for mode in passes.EXACT:
        assert all(float(found[mode][f"{what}_error"]) < 1e-5 for what in ("gram", "weights", "gradient"))
    assert {found[mode]["passes"] for mode in passes.EXACT} == {"", "loop", "batched"}
    assert found["factored, loop"]["factored"].endswith(" of 6") and not found["harvest"]["factored"]
    for mode in passes.APPROXIMATE:
        assert 0 < float(found[mode]["cosine"]) < 2 and not found[mode]["gradient_error"]
    assert (tmp_path / "here-passes.png").stat().st_size > 1000


def test_wrong_and_failing_passes_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, brief: None
) -> None:
    class Wrong(passes.Ours):
        def backward(self, losses: list[torch.Tensor], features: torch.Tensor) -> None:
            super().backward([2 * losses[0], *losses[1:]], features)

    class Failing(passes.Mode):
        pass

    monkeypatch.setitem(passes.MODES, "harvest", Wrong)
    monkeypatch.setitem(passes.MODES, "factored", Failing)
    monkeypatch.setitem(passes.MODES, "TorchJD mtl_backward", Failing)
    monkeypatch.setitem(sys.modules, "torchjd", passes)
    status, found = run_passes(tmp_path, "harvest", "factored", "TorchJD mtl_backward")
    assert status == 1 and capsys.readouterr().out.count("FAULT") == 2
    assert found["harvest"]["note"].startswith("wrong") and not found["harvest"]["ratio_to_K_backwards"]
    assert found["factored"]["note"] == found["TorchJD mtl_backward"]["note"] == "NotImplementedError"
    assert list(found) == ["K backwards", "harvest", "factored", "TorchJD mtl_backward"]


def test_kept_rows_are_seen_in_the_peak_memory() -> None:
    peaks = {mode: passes.peak_apart(SMALL, 4, mode, 1) for mode in ("plain sum", "K backwards")}
    row = 4e-6 * sum(parameter.numel() for parameter in networks.build(SMALL, 4).trunk.parameters())
    assert peaks["K backwards"] - peaks["plain sum"] == pytest.approx(3 * row, rel=0.3)


def test_an_exact_copy_passes_what_the_network_passes() -> None:
    network = networks.build(SMALL, 2)
    exact = networks.exact_copy(network)
    torch.testing.assert_close(exact.features().float(), network.features())
    with torch.no_grad():
        next(exact.trunk.parameters()).neg_()
    first = torch.nn.Sequential(*list(network.trunk.children())[:2])(network.inputs)
    copied = torch.nn.Sequential(*list(exact.trunk.children())[:2])(exact.inputs)
    assert ((copied != 0) == (first > 0)).all() and (copied < 0).any()


def test_a_quick_look_has_few_cases() -> None:
    quick, full = passes.parse(["--quick"]), passes.parse([])
    assert quick.tasks == [3, 8] and full.tasks == [3, 8, 40] and full.networks == list(networks.NETWORKS)
    assert set(quick.networks) < set(full.networks)
    assert passes.parse(["--quick", "--tasks", "2", "--networks", SMALL]).networks == [SMALL]


@pytest.mark.parametrize("arguments", [["--tasks", "1"], ["--threads", "0"], ["--networks", "x"], ["--modes", "x"]])
def test_bad_options_of_passes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        passes.main(arguments)
    assert "error" in capsys.readouterr().err


def test_wrong_gradients_fail_the_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, brief: None
) -> None:
    status, found, _ = run_steps(tmp_path, capsys)
    assert status == 0 and {(r["method"], r["correct"]) for r in found if r["provider"] == OURS} == {
        ("pcgrad", "True"),
        ("mgda", "True"),
    }
    monkeypatch.setattr(steps.Workload, "error", lambda self: 1e-3)
    status, found, said = run_steps(tmp_path, capsys)
    assert status == 1 and said.count("FAULT") == 2
    assert all(not r["ratio_to_K_backwards"] and r["correct"] == "False" for r in found if r["provider"] == OURS)


def test_a_step_that_fails_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, brief: None
) -> None:
    right = steps.Workload.ours

    def ours(self: steps.Workload) -> None:
        if self.method.name == "pcgrad":
            raise RuntimeError("an illegal memory access")
        right(self)

    monkeypatch.setattr(steps.Workload, "ours", ours)
    status, found, _ = run_steps(tmp_path, capsys)
    assert status == 1 and found[0]["note"] == "failed: RuntimeError: an illegal memory access"
    assert any(r["method"] == "mgda" and r["correct"] == "True" for r in found)


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert not plots.roofline([], tmp_path / "x.png")


@pytest.mark.parametrize(
    ("us", "text"),
    [(0.5, "0.50 us"), (12.34, "12.3 us"), (999.0, "999 us"), (1500.0, "1.50 ms"), (2e6, "2.00 s")],
)
def test_times_read_well(us: float, text: str) -> None:
    assert results.format_time(us) == text


@pytest.mark.parametrize("method", [PCGrad(), MGDA()], ids=lambda method: method.name)
def test_the_step_workload_combines_what_it_times(method: Method) -> None:
    workload = steps.Workload(2, method)
    assert workload.error() < 1e-5
    assert len(workload.backwards()) == 2 and len(workload.combination) == 1
