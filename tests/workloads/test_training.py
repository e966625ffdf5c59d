"""Trainings: Delta-m, what is chosen, going on after a kill, and the tables and page that come of records."""

import math
from pathlib import Path

import pytest

from benchmarks import train as command
from benchmarks.documents.source import read_table
from benchmarks.training import costs, evidence, jobs, peers, record, run, scores, verdict
from benchmarks.training.delta import delta_m, mean_of, spread
from benchmarks.training.jobs import Job
from benchmarks.training.options import LADDER, parse, plan
from mtl_optim.methods import Constant


def test_delta_m_by_hand() -> None:
    baseline = {"digit": 0.8, "depth": 2.0, "angle": 10.0}
    found = {"digit": 0.9, "depth": 1.5, "angle": 11.0}
    higher = {"digit": True, "depth": False, "angle": False}
    assert delta_m(found, baseline, higher) == pytest.approx(100 * (0.1 / 0.8 + 0.5 / 2.0 - 1.0 / 10.0) / 3)
    assert delta_m(baseline, baseline, higher) == 0
    assert math.isnan(delta_m(found, baseline | {"digit": 0.0}, higher))
    with pytest.raises(ValueError, match="expected the tasks"):
        delta_m({"digit": 1.0}, baseline, higher)
    assert mean_of([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 6.0}]) == {"a": 2.0, "b": 4.0}
    assert spread([1.0, 3.0]) == pytest.approx((2.0, 2**0.5, 1.0, 3.0))
    assert math.isnan(spread([1.0]).deviation)


def row(method: str, seed: int, values: dict[str, float], part: str = "", split: str = "test") -> list[dict[str, str]]:
    fixed = {"workload": "w", "method": method, "part": part, "seed": str(seed), "split": split, "step": "10"}
    return [
        fixed | {"task": task, "metric": "accuracy", "higher": "True", "value": str(value)}
        for task, value in values.items()
    ]


def test_single_tasks_are_put_together_and_tuned_weights_chosen_on_validation_data() -> None:
    rows = [
        *row("single", 0, {"a": 0.5}, "a"),
        *row("single", 0, {"b": 0.4}, "b"),
        *row("single", 1, {"a": 0.5}, "a"),  # of seed 1 a task is missing
        *row("sum", 0, {"a": 0.6, "b": 0.5}),
        *row("sum", 0, {"a": 0.6, "b": 0.5}, split="valid"),
        *row("tuned", 0, {"a": 0.9, "b": 0.9}, "0"),
        *row("tuned", 0, {"a": 0.5, "b": 0.5}, "0", "valid"),
        *row("tuned", 0, {"a": 0.7, "b": 0.5}, "1"),
        *row("tuned", 0, {"a": 0.7, "b": 0.5}, "1", "valid"),
    ]
    found = scores.read(rows)["w"]
    assert found.final("single") == {0: {"a": 0.5, "b": 0.4}}
    assert found.final("tuned") == {0: {"a": 0.7, "b": 0.5}}  # not what is best on the test data
    delta = found.delta("sum", "single")
    assert delta is not None and delta.mean == pytest.approx(100 * (0.1 / 0.5 + 0.1 / 0.4) / 2)
    short = [r | {"step": "3"} for r in row("torchjd/mgda", 0, {"a": 0.1, "b": 0.1})]  # trained for its cost alone
    beside = scores.read([*rows, *short])["w"]
    assert beside.steps == [10] and "torchjd/mgda" not in beside.test
    kept_equal = [r for r in rows if (r["method"], r["part"]) != ("tuned", "1")]
    assert scores.read(kept_equal)["w"].final("tuned") == {0: {"a": 0.6, "b": 0.5}}


def test_better_means_on_every_seed() -> None:
    rows = [r for s, v in enumerate((0.50, 0.60)) for r in row("sum", s, {"a": v})]
    rows += [r for s, v in enumerate((0.61, 0.90)) for r in row("up", s, {"a": v})]
    rows += [r for s, v in enumerate((0.59, 0.90)) for r in row("even", s, {"a": v})]
    rows += [r for s, v in enumerate((0.40, 0.49)) for r in row("down", s, {"a": v})]
    found = scores.read(rows)
    signs = [verdict.compared(found["w"], method, "sum") for method in ("up", "even", "down", "absent")]
    assert signs == [1, 0, -1, None]
    text = "\n".join(verdict.lines([], found))
    assert "of 3 pairs of a workload and a method, 1 are better, 1 equal and 1 worse" in text
    assert "Better: up on w." in text and "Worse: down on w." in text and "one of 6 pairs" in text


def test_specs_of_methods() -> None:
    tasks = ("a", "b")
    made = jobs.recipe(Job("w", "mgda:normalize=l2,transform=logsum", 3, 1, 1), tasks)
    assert made.method.name == "mgda" and made.transform is not None
    assert jobs.recipe(Job("w", "pcgrad", 3, 1, 1), tasks).method.config()["seed"] == 3
    assert jobs.recipe(Job("w", "uw", 0, 1, 1), tasks).transform is not None
    tuned = jobs.recipe(Job("w", "tuned", 0, 1, 1, "2"), tasks).method
    assert isinstance(tuned, Constant) and sum(jobs.drawn_weights(0, 2, 2)) == pytest.approx(2)
    assert jobs.drawn_weights(0, 2, 2) != jobs.drawn_weights(0, 1, 2) != jobs.drawn_weights(1, 1, 2)
    with pytest.raises(ValueError, match="unknown method"):
        jobs.recipe(Job("w", "pcgrat", 0, 1, 1), tasks)
    with pytest.raises(ValueError, match="option=value"):
        jobs.parsed("mgda:normalize")
    with pytest.raises(jobs.UnfitError):
        jobs.recipe(Job("w", "dcgd", 0, 1, 1), ("a", "b", "c"))
    assert Job("w", "mgda:normalize=l2", 0, 1, 1).file != Job("w", "mgda:normalize-l2", 0, 1, 1).file
    assert Job("w", "sum", 0, 10, 4).ends == [2, 5, 8, 10] and Job("w", "sum", 0, 1, 4).ends == [1]


def test_the_plan() -> None:
    arguments = ["--quick", "--workloads", "mixed", "physics", LADDER[0], "--seeds", "1", "--draws", "2"]
    found, left_out = plan(parse(arguments))
    assert not left_out
    by = {name: [(job.method, job.part) for job in found if job.workload == name] for name in ("mixed", "physics")}
    assert by["mixed"][:2] == [("single", "progression"), ("single", "sex")]
    assert ("tuned", "1") in by["mixed"] and not any(method == "single" for method, _ in by["physics"])
    assert {job.method for job in found if job.workload == LADDER[0]} == {"sum", "pcgrad", "mgda", "upgrad"}
    assert len({job.file for job in found}) == len(found)


def test_a_quick_grid_says_which_peers_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "available", lambda methods: ["libmtl/pcgrad", "libmtl/mgda"])
    arguments = ["--peers", "--workloads", "attributes-8", "attributes-20", "--methods", "mgda", "pcgrad"]
    jobs, left_out = plan(parse(["--quick", *arguments]))
    assert [(job.workload, job.method) for job, _ in left_out] == [("attributes-20", "libmtl/mgda")]
    assert "more than 8 tasks" in left_out[0][1] and left_out[0][0] not in jobs
    there = {job.method for job in jobs if job.workload == "attributes-20"}
    assert there == {"mgda", "pcgrad", "plain", "libmtl/pcgrad"}
    assert not plan(parse(arguments))[1]


@pytest.mark.parametrize(
    "arguments",
    ["--workloads digit", "--seeds -1", "--steps 0", "--data mnist=x", "--methods mgda:x", "--methods pcgrat",
     "--methods mgda:speed=1", "--methods other/mgda", "--methods torchjd/none"],
)  # fmt: skip
def test_what_cannot_be_is_refused(arguments: str) -> None:
    with pytest.raises(SystemExit):
        parse(arguments.split())


JOB = Job("adaptive", "pcgrad", 0, 12, 4)


class Killed(Exception):
    """In the place of a signal."""


def test_a_killed_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = run.Run(JOB, tmp_path / "whole.pt", save_every=1e9).go(lambda done, note: None)

    def kill(done: int, note: str) -> None:
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        run.Run(JOB, tmp_path / "killed.pt", save_every=0.0).go(kill)
    assert (tmp_path / "killed.pt").is_file()
    again = run.Run(JOB, tmp_path / "killed.pt", save_every=0.0)
    assert again.done == 6 and len(again.workload.widenings) > 0  # type: ignore[attr-defined]
    found = again.go(lambda done, note: None)
    assert found.curves == whole.curves and found.valid == whole.valid and found.cosines == whole.cosines
    again.forget()
    assert not (tmp_path / "killed.pt").exists()


def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path) -> None:
    run.Run(JOB, tmp_path / "a.pt", 0.0).save()
    with pytest.raises(ValueError, match="asked for was"):
        run.Run(Job("adaptive", "pcgrad", 0, 13, 4), tmp_path / "a.pt", 0.0)


ARGUMENTS = (
    "--workloads mixed attributes-2 attributes-3 --methods single sum tuned plain pcgrad dcgd "
    "--steps 4 --seeds 1 --rounds 2 --draws 1 --machine m"
).split()


def test_a_killed_command_does_the_rest_and_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    folders = ["--runs", f"{tmp_path}/runs", "--output", f"{tmp_path}/out", "--docs", f"{tmp_path}/docs/evidence.md"]
    monkeypatch.setattr(record.Record, "write", _kill_at(5, record.Record.write))
    with pytest.raises(Killed):
        command.main([*ARGUMENTS, *folders, "--workers", "1"])
    monkeypatch.undo()
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    assert len(done) == 4
    assert command.main([*ARGUMENTS, *folders, "--workers", "2"]) == 0  # baselines in processes of their own
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    rows = read_table(tmp_path / "out" / "m-train.csv")
    assert len(rows) == (2 + 5) + 4 + (3 + 5)  # of attributes-2 no baselines
    left_out = [(r["workload"], r["method"]) for r in rows if r["note"]]
    assert left_out == [("attributes-3", "dcgd")]
    combined = next(r for r in rows if r["method"] == "pcgrad")
    parts = (
        "forward_ms",
        "passes_ms",
        "combination_ms",
        "optimizer_ms",
        "gram_ms",
        "solve_ms",
        "combine_ms",
        "peak_mb",
        "raw_passes_ms",
        "whole_ms",
    )
    assert all(float(combined[name]) >= 0 for name in parts) and combined["commit"] and combined["torch"]
    page = (tmp_path / "docs" / "evidence.md").read_text()
    for text in (
        "Workloads",
        "When not to combine gradients",
        "What a step costs",
        "Left out",
        "- dcgd on attributes-3",
    ):
        assert text in page
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [f"m-train-{name}.png" for name in ("cosines", "costs", "curves", "pareto")]
    evidence.write(tmp_path / "out", "m", tmp_path / "docs" / "evidence.md")
    assert (tmp_path / "docs" / "evidence.md").read_text() == page
    with pytest.raises(ValueError, match="another folder with --runs"):
        command.main([*ARGUMENTS, *folders, "--steps", "7"])


def _kill_at(number: int, write):  # type: ignore[no-untyped-def]
    calls = []

    def wrapped(self: record.Record, path: Path) -> None:
        calls.append(path)
        if len(calls) == number:
            raise Killed
        write(self, path)

    return wrapped


def test_costs_say_what_is_above_the_budget() -> None:
    fixed = {"workload": "w", "K": "2", "forward_ms": "1", "optimizer_ms": "1", "peak_mb": "3"}
    kernels = {"gram_ms": "0.1", "solve_ms": "0.1", "combine_ms": "0.2"}
    step = {"passes_ms": "10", "combination_ms": "1"}
    runs = [
        fixed | kernels | step | {"method": "a", "raw_passes_ms": "10", "whole_ms": "11"},
        fixed | kernels | step | {"method": "b", "raw_passes_ms": "100", "whole_ms": "101"},
        fixed | {"method": "plain", "passes_ms": "1", "combination_ms": "0"},
        fixed | {"method": "torchjd/a", "passes_ms": "20", "combination_ms": "4", "apart": "1e-6", "longer": "1"},
    ]
    cells, over = costs.cost_rows(runs)
    assert [line[2] for line in cells] == ["a", "b"] and [line[10] for line in cells] == ["10.0 %", "1.0 %"]
    assert over == [("w", "a", pytest.approx(0.1), pytest.approx(0.6))]
    assert costs.where_time_goes(over, 2)[0].startswith("1 of 2 are within 5 % of their passes; the others are 10 %")
    head, lines = costs.peer_rows(runs)
    assert head[5:] == ["torchjd", "torchjd / ours", "apart, length"]
    assert lines == [["w", "2", "a", "3 (3)", "13 (3)", "26 (3)", "2.0", "1e-06, 1.00"]]


@pytest.mark.parametrize(("spec", "limit"), [("torchjd/mgda", 0.2), ("torchjd/upgrad", 1e-3), ("libmtl/mgda", 0.5)])
def test_peers_take_the_same_steps(spec: str, limit: float) -> None:
    if spec not in peers.available([spec.partition("/")[2]]):
        pytest.skip(f"{spec} is not installed")
    found = peers.agreement(Job("mixed", spec, 0, 1, 1))
    assert found["apart"] < limit


def test_unknown_peers_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown peer"):
        run.stepper_of(Job("mixed", "other/pcgrad", 0, 1, 1), run.registry.build("mixed", 0))
