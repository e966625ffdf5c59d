"""The page that `make gpu` leaves: what was lost is told, and no number stands where a result was wrong."""

from pathlib import Path

from benchmarks import passes
from benchmarks.results import OURS, Row, write_csv
from benchmarks.stages import Stage
from benchmarks.steps import COLUMNS
from benchmarks.summary import summary


def row(kernel: str, provider: str = OURS, us: float = 800.0, **columns: object) -> Row:
    found = Row(kernel, provider, 8, 10**8, "float32", us, us, us, measure="graph", correct=True)
    for name, value in columns.items():
        setattr(found, name, value)
    return found


def page(tmp_path: Path, *rows: Row, steps: str = "") -> str:
    write_csv(rows, tmp_path / "card.csv")
    if steps:
        (tmp_path / "card-steps.csv").write_text(f"{','.join(COLUMNS)}\n{steps}\n")
    return summary([], tmp_path, ["date: today"])


def step_line(**values: object) -> str:
    return ",".join(str(values.get(name, "")) for name in COLUMNS)


def test_ours_stand_beside_the_best_of_torch(tmp_path: Path) -> None:
    ours = row("gram", gb_per_s=4000.0, ratio=1.05, budget=1 / 0.9, within_budget=True, backend="cuda")
    text = page(
        tmp_path,
        ours,
        row("gram", "torch.mm", 1600.0, times_ours=2.0),
        row("gram", "torch.mm float32 out", 1200.0, correct=False, error=0.1),
        row("gram", "torch._foreach_norm, norms only", 400.0, times_ours=0.5),
        row("gram", f"{OURS} triton", 1000.0, times_ours=1.25, backend="triton"),
    )
    assert "## gram (cuda)" in text and "date: today" in text
    assert "| 8 | 100000000 | float32 | 800 | 4000 | 0.95 | 0.90 | True | torch.mm | 1600 | 2.00 | 1.25 |" in text
    assert "copies of its tables" in text
    assert "| gram | 8 | 100000000 | float32 | torch.mm float32 out | graph | 0.1 |" in text, "among the wrong ones"


def test_nothing_was_lost(tmp_path: Path) -> None:
    text = page(tmp_path, row("gram", ratio=1.05, budget=1.11, within_budget=True))
    assert "Nothing was wrong, failed, left out or beyond its budget." in text
    assert "Nothing was wrong" not in summary([], tmp_path / "empty", [])


def test_a_wrong_result_shows_no_number_of_any_kind(tmp_path: Path) -> None:
    text = page(
        tmp_path,
        row("combine", gb_per_s=4000.0, correct=False, error=float("nan")),
        row("pcgrad_step", us=21.0, N=10**4, measure="latency", correct=False, error=0.5),
        row("pcgrad_step", "torchjd", us=99.0, N=10**4, measure="latency"),
        steps=step_line(K=3, method="pcgrad", provider=OURS, median_ms=9, correct=False),
    )
    assert "## Wrong results" in text and "| combine | 8 | 100000000 | float32 | mtl-kernels | graph | nan |" in text
    assert "| 8 | 100000000 | float32 | 800 | 4000 | WRONG |" in text
    assert "| pcgrad_step | 8 | float32 | latency | WRONG | " in text and "| 21 |" not in text
    assert "| training step | 3 |" in text and "| 3 | pcgrad | mtl-kernels | 9 |  | WRONG |" in text


def test_missed_budgets_are_told_with_what_was_found(tmp_path: Path) -> None:
    text = page(
        tmp_path,
        row("gram", ratio=2.0, budget=1 / 0.9, within_budget=False),
        row("mgda_step", us=71.0, N=10**4, measure="latency", budget=60.0, within_budget=False),
        row("mgda_step", us=41.0, N=10**4, ratio=9.0, budget=30.0, within_budget=False),
        row("combine", measure="count", launches=3, copies=1, syncs=2, budget=1, within_budget=False),
        steps=step_line(K=8, method="mgda", provider=OURS, ratio_to_K_backwards=1.3, within_budget=False, correct=True),
    )
    missed = text.split("## Budgets missed")[1].split("##")[0]
    assert "| gram | 8 | 100000000 | float32 | graph | 0.50 of a copy | 0.90 |" in missed
    assert "| mgda_step | 8 | 10000 | float32 | latency | 71 us | 60 us |" in missed
    assert "| mgda_step | 8 | 10000 | float32 | graph | 41 us | 30 us |" in missed
    assert "| 8 | 10000 | float32 | 41 |  | 0.11 | 30 us | False |" in text
    assert "| 3 kernels, 2 waits | 1 kernels, no wait |" in missed
    assert "| training step | 8 |  | mgda | of K backwards | 1.3 | 1.05 |" in missed
    assert "| combine | 3 | 1 | 2 | False |" in text


def test_what_was_not_measured_says_why(tmp_path: Path) -> None:
    nan = float("nan")
    text = page(
        tmp_path,
        row("gram", us=nan, measure="left out", correct=None, note="no time left"),
        row("combine", "torch.mm", us=nan, measure="failed", correct=None, note="OutOfMemoryError: of 47 GiB"),
        row("mgda_step", us=nan, measure="missing", correct=None, note="its latency has a budget"),
        steps=step_line(K=40, method="pcgrad", provider=OURS, note="failed: RuntimeError: illegal access"),
    )
    lost = text.split("## Not measured")[1].split("##")[0]
    for reason in ("no time left", "OutOfMemoryError: of 47 GiB", "its latency has a budget", "illegal access"):
        assert reason in lost


def test_calls_and_steps_have_their_tables(tmp_path: Path) -> None:
    text = page(
        tmp_path,
        row("pcgrad_step", us=21.0, N=10**4, measure="latency", budget=30.0, within_budget=True),
        row("pcgrad_step", "torch PCGrad loop", us=210.0, N=10**4, measure="latency", times_ours=10.0),
        row("min_norm", us=9.0, N=0, dtype="float64", measure="call", batch=1),
        steps=step_line(K=3, method="pcgrad", provider=OURS, median_ms=9, ratio_to_K_backwards=1.02, correct=True),
    )
    assert "| pcgrad_step | 8 | float32 | latency | 21 | 30 | True | torch PCGrad loop | 210 | 10.00 |" in text
    assert "| min_norm | 8 | float64 | call | 9 |" in text
    assert "| 3 | pcgrad | mtl-kernels | 9 |  | 1.02 |" in text


def test_passes_have_their_table_and_their_losses(tmp_path: Path) -> None:
    rows = [
        {"network": "encoder", "K": 8, "mode": "factored", "median_ms": 12.0, "ratio_to_K_backwards": 0.5},
        {"network": "encoder", "K": 40, "mode": "harvest", "note": "RuntimeError: illegal access"},
    ]
    passes.write(rows, {}, tmp_path / "card-passes.csv")
    text = summary([], tmp_path, [])
    assert "## Passes of a step" in text and "| encoder | 8 | factored | 12 | 0.5 |" in text
    assert "| passes | encoder | 40 |  |  |  | harvest | RuntimeError: illegal access |" in text


def test_a_stage_that_failed_shows_its_end(tmp_path: Path) -> None:
    stage = Stage("build", [], 5.0, result="failed: exit status 1", tail=["nvcc fatal: no such thing"])
    text = summary([stage], tmp_path, [])
    assert "| build | failed: exit status 1 | 0 |" in text and "nvcc fatal" in text.split("The end of: build")[1]


def test_what_failed_comes_first_and_what_it_puts_in_doubt(tmp_path: Path) -> None:
    def stages(result: str) -> list[Stage]:
        first = Stage("first tests", [], 5.0, result=result, doubt="do not go by the times below")
        return [first, Stage("build", [], 5.0, result="passed"), Stage("racecheck", [], 5.0, result="failed: late")]

    lines = summary(stages("failed: exit status 1"), tmp_path, ["date: today"]).split("\n")
    assert lines[:6] == [
        "# GPU report", "", "**Failed: first tests, racecheck.**", "", "**Do not go by the times below.**", "",
    ]  # fmt: skip
    assert "Do not go by" not in summary(stages("passed"), tmp_path, [])
    assert summary(stages("passed")[:2], tmp_path, ["date: today"]).split("\n")[:3] == [
        "# GPU report", "", "- date: today",
    ]  # fmt: skip
