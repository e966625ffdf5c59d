"""ReNorm: shared gradients as long as those of the heads, on matrices and in training steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mtl_kernels as mk
from mtl_optim import CRMOGM, Method, MultiTaskOptimizer, Normalized, ReNorm
from mtl_optim import losses as L
from optim.oracle import TwoHeads, rows_of
from strategies import row_matrices


@given(row_matrices(), st.integers(0, 2**31))
def test_rows_get_the_length_of_their_heads(rows: np.ndarray, seed: int) -> None:
    matrix, generator = torch.from_numpy(rows), torch.Generator().manual_seed(seed)
    heads = torch.rand(len(matrix), generator=generator, dtype=torch.float64) * 10.0 ** (seed % 7 - 3)
    weights = ReNorm().weights(mk.gram(matrix), head_norms=heads)
    lengths = matrix.norm(dim=1)
    expected = torch.where(lengths > 0, heads, 0.0)
    torch.testing.assert_close(weights * lengths, expected, rtol=1e-12, atol=0)
    assert torch.equal(ReNorm()(matrix, head_norms=heads), mk.combine(matrix, weights))


def test_degenerate_problems() -> None:
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    gram, heads = mk.gram(matrix), torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    assert ReNorm().weights(gram, head_norms=heads).tolist() == [0.2, 0, 0]
    active = torch.tensor([True, False, False])
    unknown = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float64)
    assert ReNorm().weights(gram, head_norms=unknown, active=active).tolist() == [0.2, 0, 0]
    assert ReNorm().weights(gram, head_norms=unknown).tolist() == [1 / 3] * 3
    assert ReNorm().weights(gram * torch.nan, head_norms=heads).tolist() == [1 / 3] * 3
    both = ReNorm().with_heads(heads).weights(torch.stack([gram, 4 * gram]))
    assert both.tolist() == [[0.2, 0, 0], [0.1, 0, 0]]


@pytest.mark.parametrize(
    ("heads", "error", "text"),
    [
        (None, ValueError, "needs the norms of the tasks' head gradients: pass head_norms="),
        ([1.0, 2.0], TypeError, "expected head_norms as a floating-point tensor .* found list"),
        (torch.ones(2, dtype=torch.int64), TypeError, "found torch.int64"),
        (torch.ones(3), ValueError, r"of shape \[2\], found \[3\]"),
    ],
)
def test_norms_that_are_none(heads: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ReNorm()(torch.eye(2), head_norms=heads)


@pytest.mark.usefixtures("each_capture")
@pytest.mark.parametrize("head_scaling", ["none", "weights"])
@pytest.mark.parametrize("granularity", ["model", "group", "parameter"])
def test_a_step(granularity: str, head_scaling: str) -> None:
    model = TwoHeads(3)
    params = list(model.parameters())
    count = len(list(model.trunk.parameters()))
    rows = rows_of(model.losses(), params)
    heads = [torch.cat([g.reshape(-1) for g in row[count:] if g is not None]).norm() for row in rows]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    opt = MultiTaskOptimizer(
        torch.optim.SGD(groups, lr=0.1), ReNorm(), granularity=granularity, head_scaling=head_scaling
    )
    opt.backward(model.losses())
    blocks = {"model": [range(count)], "group": [range(2), range(2, count)], "parameter": [[p] for p in range(count)]}
    for block in blocks[granularity]:
        lengths = [torch.cat([row[p].reshape(-1) for p in block]).norm() for row in rows]
        for p in block:
            expected = sum(h / n * row[p] for h, n, row in zip(heads, lengths, rows, strict=True))
            torch.testing.assert_close(params[p].grad, expected)
    if head_scaling == "none":
        for k, row in enumerate(rows):
            torch.testing.assert_close(model.heads[k].weight.grad, row[count + 2 * k])


def test_around_and_in_front() -> None:
    """Inside wrappers; the learned numbers of a transform are no heads."""
    cases: list[tuple[Method, L.SumOfTerms | None]] = [
        (ReNorm(), None),
        (Normalized(ReNorm()), None),
        (CRMOGM(ReNorm()), None),
        (ReNorm(), L.UncertaintyWeighting(2).double()),
    ]
    found = []
    for method, transform in cases:
        model = TwoHeads(2)
        learned = [] if transform is None else list(transform.parameters())
        opt = MultiTaskOptimizer(torch.optim.SGD([*model.parameters(), *learned], lr=0.1), method, transform=transform)
        opt.backward(model.losses())
        found.append(model.trunk[0].weight.grad)
    for scale, grad in zip((1, 1, 0.5), found[1:], strict=True):
        torch.testing.assert_close(grad, scale * found[0])
    restored = CRMOGM(ReNorm())
    restored.load_state_dict(CRMOGM(ReNorm()).state_dict())


def test_a_task_alone() -> None:
    model = TwoHeads(2)
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ReNorm())

    def alone() -> float:
        opt.zero_grad()
        opt.backward({"0": model.losses()[0]})
        return float(torch.cat([p.grad.reshape(-1) for p in model.trunk.parameters()]).norm())

    params = list(model.parameters())
    row = rows_of(model.losses(), params)[0]
    count = len(list(model.trunk.parameters()))
    assert alone() == pytest.approx(float(torch.cat([g.reshape(-1) for g in row[:count]]).norm()))  # no head known
    opt.zero_grad()
    opt.backward(model.losses())
    head = float(torch.cat([g.reshape(-1) for g in row[count:] if g is not None]).norm())
    assert alone() == pytest.approx(head)


@pytest.mark.parametrize("plain_group", [False, True])
def test_a_task_without_a_head_is_named(plain_group: bool) -> None:
    trunk, head = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [trunk]}, {"params": [head], "mtl": not plain_group}]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), ReNorm())
    losses = {"with": (trunk * head).sum(), "without": trunk.square().sum()}
    with pytest.raises(ValueError, match=f"task '{'with' if plain_group else 'without'}' reaches no parameter of its"):
        opt.backward(losses, retain_graph=True)
    assert trunk.grad is None and head.grad is None
    opt.backward({"with": losses["with"]})


def test_a_zero_head_stops_its_task() -> None:
    trunk, first, second = (nn.Parameter(torch.tensor(v)) for v in ([1.0, 2.0], [0.0, 0.0], [1.0, 1.0]))
    opt = MultiTaskOptimizer(torch.optim.SGD([trunk, first, second], lr=0.1), ReNorm())
    opt.backward([(trunk + 0 * first).sum(), (trunk * second).sum() * 3])
    length = torch.tensor([3.0, 6.0]).norm()
    torch.testing.assert_close(trunk.grad, length / torch.tensor([3.0, 3.0]).norm() * torch.tensor([3.0, 3.0]))
