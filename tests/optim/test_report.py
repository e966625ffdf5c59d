"""opt.report against the rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtl_optim import MGDA, Mean, MultiTaskOptimizer, PCGrad


def test_report() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = MultiTaskOptimizer(torch.optim.SGD([w], lr=0.1), PCGrad(order="fixed"))
    assert opt.report is None
    a, b, c = torch.tensor([[3.0, 0.0], [-1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    opt.backward({"a": w @ a, "b": w @ b, "c": w @ c})
    report = opt.report
    assert report.tasks == ("a", "b", "c") and report.age == 0 and report.problems == ()
    assert report.norms.tolist() == [3, 2**0.5, 2]
    assert torch.allclose(report.cosines[0], torch.tensor([1, -(0.5**0.5), 0], dtype=torch.float64))
    assert float(report.conflict_fraction) == 1 / 3
    assert report.gap is None and report.iterations is None
    assert report.active.all() and report.weights.shape == (3,)
    text = str(report)
    assert "3 tasks, 33% of the pairs in conflict" in text and "-0.71" in text and len(text.splitlines()) == 5
    assert repr(report) == "Report(tasks=['a', 'b', 'c'], gram=[3, 3] on cpu, age=0)"
    opt.zero_grad()
    opt.backward({"a": w @ a, "c": w @ c})
    assert float(opt.report.conflict_fraction) == 0 and float(report.conflict_fraction) == 1 / 3


def test_certificate() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = MultiTaskOptimizer(torch.optim.SGD([w], lr=0.1), MGDA())
    opt.backward([w[0] * 2, w[1]])
    assert torch.allclose(opt.report.weights, torch.tensor([0.2, 0.8], dtype=torch.float64))
    assert abs(float(opt.report.gap)) < 1e-12 and opt.report.iterations.dtype == torch.int64
    assert "duality gap" in str(opt.report)


@pytest.mark.parametrize("granularity", ["model", "group"])
def test_a_report_that_is_written_to_changes_no_later_step(granularity: str) -> None:
    w, head = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    opt = MultiTaskOptimizer(torch.optim.SGD([w, head], lr=0.1), Mean(), granularity=granularity, tasks=["a", "b", "c"])
    for losses in ({"a": w.sum(), "b": 3 * w.sum()}, {"a": w.sum(), "b": head.sum()}):
        for _ in range(2):
            opt.zero_grad()
            opt.backward(losses, retain_graph=True)
            report = opt.report
            assert report.active.flatten().tolist() == [True, True, False]
            for tensor in (report.active, report.weights, report.gram):
                tensor.zero_()
    opt.zero_grad()
    opt.backward({"a": w.sum(), "b": 3 * w.sum()})
    assert w.grad.tolist() == [2, 2]
