"""Averages over steps: what `ConflictMonitor` keeps, writes and draws."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_optim import MGDA, ConflictMonitor, GradDrop, MultiTaskOptimizer, PCGrad
from optim.recording import Recording


class Directions(nn.Module):
    """Two weights; a task's gradient is what its direction says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))

    def losses(self, **directions: tuple[float, float]) -> dict[str, Tensor]:
        return {
            name: (self.first * torch.tensor(to, dtype=torch.float64)).sum() + 2 * self.second[0]
            for name, to in directions.items()
        }


def watched(every: int = 2, **options: Any) -> tuple[Directions, MultiTaskOptimizer, dict[str, Any]]:
    model = Directions()
    method = options.pop("method", None) or MGDA()
    return model, MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), method, **options), {"every": every}


def run(model: Directions, opt: MultiTaskOptimizer, *steps: dict[str, tuple[float, float]]) -> None:
    for directions in steps:
        opt.zero_grad()
        opt.backward(model.losses(**directions))
        opt.step()


def cosine(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def test_means_of_an_interval() -> None:
    model, opt, options = watched()
    monitor = ConflictMonitor(opt, **options)
    run(model, opt, {"a": (3, 0), "b": (0, 4)}, {"a": (9, 0), "b": (-9, 0)}, {"a": (1, 1), "b": (1, 1)})
    (record,) = monitor.history
    first, second = cosine((3, 0, 2), (0, 4, 2)), cosine((9, 0, 2), (-9, 0, 2))
    assert record.step == 2 and record.tasks == ("a", "b") and record.layers == {}
    assert record.cosines[0][1] == pytest.approx((first + second) / 2) and record.cosines[0][0] == pytest.approx(1)
    assert record.conflicts[0][1] == record.conflict_fraction == 0.5
    assert record.norms[0] == pytest.approx((math.hypot(3, 2) + math.hypot(9, 2)) / 2)
    assert sum(record.weights) == pytest.approx(1)
    monitor.close()
    assert [one.step for one in monitor.history] == [2, 3]
    assert monitor.history[1].cosines[0][1] == pytest.approx(1)
    expected = 0.9 * (first + second) / 2 + 0.1
    assert float(monitor.cosines[0, 1]) == pytest.approx(expected)
    run(model, opt, {"a": (1, 1), "b": (1, 1)})  # watched no longer
    assert len(monitor.history) == 2


def test_absent_and_new_tasks() -> None:
    model, opt, options = watched(every=4)
    with ConflictMonitor(opt, **options) as monitor:
        run(model, opt, {"a": (1, 0), "b": (1, 0)}, {"a": (1, 0)}, {"b": (1, 0), "c": (1, 0)})
    before, after = monitor.history  # a new task begins an interval of its own
    assert before.tasks == ("a", "b") and after.tasks == ("a", "b", "c")
    assert before.norms[0] == pytest.approx(math.hypot(1, 2))
    assert math.isnan(after.norms[0]) and math.isnan(after.cosines[0][2]) and after.cosines[1][2] == pytest.approx(1)
    assert math.isnan(float(monitor.cosines[0, 2])) and float(monitor.cosines[0, 1]) == pytest.approx(1)
    assert "null" in after.json() and "NaN" not in after.json()


def test_problems_are_layers() -> None:
    model, opt, options = watched(every=1, granularity="parameter")
    monitor = ConflictMonitor(opt, model=model, **options)
    run(model, opt, {"a": (1, 0), "b": (-1, 0)})
    (record,) = monitor.history
    assert record.layers["first"][0][1] == pytest.approx(-1) and record.layers["second"][0][1] == pytest.approx(1)
    assert record.cosines[0][1] == pytest.approx(cosine((1, 0, 2), (-1, 0, 2)))
    assert all(0 <= weight <= 1 for weight in record.weights)


def test_what_says_nothing_new_does_not_count() -> None:
    model, opt, options = watched(every=1, refresh_every=2)
    monitor = ConflictMonitor(opt, **options)
    run(model, opt, *[{"a": (1, 0), "b": (0, 1)}] * 4)
    assert [record.step for record in monitor.history] == [1, 2]
    run(model, opt, {"a": (float("nan"), 0), "b": (0, 1)})
    assert len(monitor.history) == 2


def test_methods_without_weights() -> None:
    model, opt, options = watched(every=1, method=GradDrop())
    monitor = ConflictMonitor(opt, **options)
    run(model, opt, {"a": (1, 0), "b": (0, 1)})
    assert all(map(math.isnan, monitor.history[0].weights)) and monitor.history[0].norms[0] > 0


def test_files_and_writers(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.found: dict[tuple[str, int], float] = {}

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.found[tag, global_step] = scalar_value

    model, opt, options = watched(every=1)
    writer, path = Writer(), tmp_path / "conflicts.jsonl"
    with ConflictMonitor(opt, jsonl=path, writer=writer, **options) as monitor:
        run(model, opt, {"a": (1, 0), "b": (0, 1)}, {"a": (1, 0), "b": (-9, 1)})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[1]["cosines"][0][1] < 0
    assert writer.found["conflicts/fraction of pairs", 2] == 1.0
    assert writer.found["cosines/a, b", 1] == pytest.approx(monitor.history[0].cosines[0][1])
    monitor.heatmap(tmp_path / "heatmap.png")
    monitor.timeline(tmp_path / "timeline.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("heatmap.png", "timeline.png"))


def test_groups_of_tasks() -> None:
    model, opt, options = watched(every=1)
    monitor = ConflictMonitor(opt, **options)
    with pytest.raises(ValueError, match="nothing was recorded yet"):
        monitor.groups()
    with pytest.raises(ValueError, match="nothing was recorded yet"):
        monitor.heatmap("nowhere.png")
    run(model, opt, {"a": (90, 9), "b": (-90, 8), "c": (90, 8), "d": (-91, 9), "e": (0.0, 95)})
    assert monitor.groups() == [["a", "c", "e"], ["b", "d"]] or monitor.groups() == [["a", "c"], ["b", "d", "e"]]
    assert monitor.groups(above=0.5) == [["a", "c"], ["b", "d"], ["e"]]
    assert monitor.groups(number=1) == [["a", "b", "c", "d", "e"]] and len(monitor.groups(number=2)) == 2
    with pytest.raises(ValueError, match="expected 1 to 5 groups, found 6"):
        monitor.groups(number=6)


def test_nothing_is_read_on_the_host_between_records() -> None:
    model, opt, options = watched(every=10, method=PCGrad())
    monitor = ConflictMonitor(opt, **options)
    run(model, opt, {"a": (1, 0), "b": (0, 1)})
    opt.backward(model.losses(a=(1.0, 0.0), b=(0.0, 1.0)))
    with Recording():
        monitor.update()
    assert not monitor.history


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (True, TypeError), (1.5, TypeError)])
def test_every(every: Any, error: type[Exception]) -> None:
    _, opt, _ = watched()
    with pytest.raises(error, match="every"):
        ConflictMonitor(opt, every=every)


@pytest.mark.parametrize("granularity", ["model", "parameter"])
def test_it_goes_on_from_a_checkpoint(tmp_path: Path, granularity: str) -> None:
    steps: list[dict[str, tuple[float, float]]] = [
        {"a": (3, 0), "b": (-1, 4)}, {"a": (9, 0)}, {"a": (1, 1), "b": (-1, 1)}, {"a": (2, 1), "b": (1, 5)},
        {"a": (0, 1), "b": (1, -5)},
    ]  # fmt: skip
    model, opt, options = watched(granularity=granularity)
    with ConflictMonitor(opt, **options) as whole:
        run(model, opt, *steps)
    model, opt, options = watched(granularity=granularity)
    first = ConflictMonitor(opt, **options)
    run(model, opt, *steps[:3])  # in the middle of an interval
    torch.save(first.state_dict(), tmp_path / "monitor.pt")
    first.close()
    with ConflictMonitor(opt, **options) as second:
        second.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
        run(model, opt, *steps[3:])
    assert [record.json() for record in second.history] == [record.json() for record in whole.history]
    assert torch.equal(second.cosines, whole.cosines) and len(second.history) == 3


SHORT_SUMS = {
    "tasks": ["a", "b"], "problems": [], "pairs": torch.zeros(3, 1, 2, dtype=torch.float64),
    "of_tasks": torch.zeros(3, 2, dtype=torch.float64), "layers": torch.zeros(2, 0, 2, 2, dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "expected a state of version 1, found 2"),
        ({"history": [{}]}, "found it damaged"),
        ({"sums": {"tasks": ["a"]}}, "found it damaged"),
        ({"sums": SHORT_SUMS}, "for 2 tasks"),
    ],
)
def test_a_bad_state_leaves_it_as_it_was(change: dict[str, Any], message: str) -> None:
    model, opt, options = watched()
    monitor = ConflictMonitor(opt, **options)
    run(model, opt, *[{"a": (3, 0), "b": (0, 4)}] * 3)
    with pytest.raises(ValueError, match=message):
        monitor.load_state_dict({**monitor.state_dict(), **change})
    run(model, opt, {"a": (3, 0), "b": (0, 4)})
    assert [record.step for record in monitor.history] == [2, 4]


def test_an_optimizer_of_one_loss_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a MultiTaskOptimizer, found SGD"):
        ConflictMonitor(torch.optim.SGD(Directions().parameters(), lr=0.0))  # type: ignore[arg-type]
