"""CAGrad as a method: options, and steps of an optimizer with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mtl_kernels as mk
from mtl_optim import CAGrad, Mean, MultiTaskOptimizer, get_method

MATRIX = torch.randn(5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MATRIX[1] -= 2 * MATRIX[0]


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
def test_no_direction_within_reach_is_better(c: float) -> None:
    """min_i g_i . d is concave in d, so a d that no small step on the sphere improves is the best."""
    mean, d = MATRIX.mean(0), CAGrad(c)(MATRIX)
    reach = c * mean.norm()
    torch.testing.assert_close((d - mean).norm(), reach)
    worst = (MATRIX @ d).min()
    generator = torch.Generator().manual_seed(0)
    for size in (1e-4, 1e-2, 1.0):
        others = (d - mean) / reach + size * torch.randn(2000, 9, generator=generator, dtype=torch.float64)
        others = mean + reach * others / others.norm(dim=1, keepdim=True)
        assert (MATRIX @ others.T).amin(0).max() <= worst + 1e-12
    assert worst > (MATRIX @ mean).min()
    assert mean @ d >= (1 - c) * mean @ mean


def test_options() -> None:
    gram = mk.gram(MATRIX)
    plain = CAGrad(c=0.5).weights(gram)
    torch.testing.assert_close(CAGrad(c=0.5, rescale="paper").weights(gram), plain / 1.25)
    torch.testing.assert_close(CAGrad(c=0.5, rescale="max").weights(gram), plain / 1.5)
    torch.testing.assert_close(CAGrad(c=0.5, scale="sum").weights(gram), plain * 5)
    active = torch.tensor([True, True, False, True, False])
    summed = CAGrad(c=0.5, scale="sum").weights(gram, active=active)
    torch.testing.assert_close(summed, CAGrad(c=0.5).weights(gram, active=active) * 3)
    assert torch.equal(CAGrad(c=0).weights(gram), Mean().weights(gram))
    found = CAGrad().solve(gram)
    assert found.gap is not None and 0 <= found.gap < 1e-12 and found.iterations is not None
    assert CAGrad().config() == {"c": 0.4, "rescale": "none", "scale": "mean"} and CAGrad().state_dict() == {}
    assert isinstance(get_method("CAGrad", c=0.5), CAGrad)


def test_what_the_optimizer_asks() -> None:
    assert CAGrad().weighs_alone and CAGrad(rescale="paper").weighs_alone
    assert not CAGrad(rescale="max").weighs_alone and not CAGrad(c=0).weighs_alone
    assert CAGrad().scales_with_gradient and CAGrad().stops_at_zero_rows and not CAGrad(c=0).stops_at_zero_rows
    one = torch.tensor([[4.0]])
    torch.testing.assert_close(CAGrad(rescale="max").weights(one), torch.ones(1, dtype=torch.float64))


def losses_of(weight: Tensor, seed: int) -> dict[str, Tensor]:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = torch.tanh(x @ weight)
    return {str(k): (y[:, k % 3] - (-1) ** k * x[:, k]).square().mean() for k in range(4)}


def test_training() -> None:
    weight = nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    opt = MultiTaskOptimizer(torch.optim.SGD([weight], lr=0.1), CAGrad())
    before = sum(loss.item() for loss in losses_of(weight, 0).values())
    for _ in range(30):
        opt.zero_grad()
        losses = losses_of(weight, 0)
        rows = [[torch.autograd.grad(loss, weight, retain_graph=True)[0]] for loss in losses.values()]
        opt.backward(losses)
        torch.testing.assert_close(weight.grad, CAGrad()(rows)[0])
        opt.step()
    assert sum(loss.item() for loss in losses_of(weight, 0).values()) < 0.9 * before


def test_a_zero_row_is_told() -> None:
    weight = nn.Parameter(torch.ones(3))
    opt = MultiTaskOptimizer(torch.optim.SGD([weight], lr=0.1), CAGrad())
    with pytest.warns(UserWarning, match="gradient of task 'ignored' is zero"):
        opt.backward({"task": weight.sum(), "ignored": 0 * weight.square().sum()})
        opt.step()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"c": "0.4"}, TypeError, "c as a number, found '0.4'"),
        ({"c": True}, TypeError, "c as a number"),
        ({"c": -0.1}, ValueError, "finite c >= 0, found -0.1"),
        ({"c": float("inf")}, ValueError, "finite c >= 0"),
        ({"rescale": 1}, ValueError, "'none', 'paper', 'max'"),
        ({"scale": "total"}, ValueError, "'mean', 'sum'"),
    ],
)
def test_bad_options(options, error, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        CAGrad(**options)
