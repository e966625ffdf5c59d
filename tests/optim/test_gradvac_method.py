"""GradVac as a method: its targets over the steps of an optimizer, kept and resumed."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

import mtl_kernels as mk
from mtl_optim import GradVac, MultiTaskOptimizer, PCGrad, get_method

ROWS = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_state_is_targets_and_order() -> None:
    method, gram = GradVac(beta=0.25, target=-0.5, seed=3), mk.gram(ROWS)
    targets, rng = torch.full((4, 4), -0.5, dtype=torch.float64), mk.rng_state(3)
    for step in range(3):
        expected = mk.gradvac_weights(gram, state=targets, beta=0.25, rng=rng)
        assert torch.equal(method.weights(gram), expected)
        assert torch.equal(method.state["targets"], targets)
        assert method.state["rng"].tolist() == [3, step + 1]
        rng[1] += 1
    assert GradVac(order="fixed").weights(gram).shape == (4,)
    assert method.config() == {"beta": 0.25, "target": -0.5, "order": "random", "reduction": "sum", "seed": 3}
    assert isinstance(get_method("grad_vac", beta=0.01), GradVac)


def test_without_memory_it_is_pcgrad() -> None:
    torch.testing.assert_close(GradVac(beta=0.0, seed=5)(ROWS), PCGrad(seed=5)(ROWS))
    torch.testing.assert_close(
        GradVac(beta=0.0, reduction="mean", order="fixed")(ROWS), PCGrad(reduction="mean", order="fixed")(ROWS)
    )


def test_saved_and_loaded_it_goes_on() -> None:
    method, twin = GradVac(seed=1), GradVac(seed=1)
    grams = [mk.gram(ROWS.roll(k, 1) + k) for k in range(6)]
    for gram in grams[:3]:
        method.weights(gram)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    for gram in grams[3:]:
        assert torch.equal(method.weights(gram), twin.weights(gram))
    assert torch.equal(method.state["targets"], twin.state["targets"])
    method.reset()
    assert method.state_dict() == {} and torch.equal(method.weights(grams[0]), GradVac(seed=1).weights(grams[0]))


def test_other_tasks_are_refused_and_broken_ones_forgotten() -> None:
    method = GradVac(order="fixed")
    method.weights(mk.gram(ROWS))
    before = method.state["targets"].clone()
    with pytest.raises(ValueError, match="keeps the state of 4 tasks and was given 3; name all"):
        method.weights(mk.gram(ROWS[:3]))
    broken = ROWS.clone()
    broken[1, 2] = torch.nan
    assert method.weights(mk.gram(broken)).tolist() == [0.25] * 4
    assert torch.equal(method.state["targets"], before)
    method.weights(mk.gram(ROWS), active=torch.tensor([True, False, True, True]))
    assert torch.equal(method.state["targets"][1], before[1])
    assert not torch.equal(method.state["targets"], before)


def losses_of(weight: Tensor, seed: int) -> dict[str, Tensor]:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = torch.tanh(x @ weight)
    return {str(k): (y[:, k % 3] - (-1) ** k * x[:, k]).square().mean() for k in range(4)}


@pytest.mark.parametrize("granularity", ["model", "parameter"])
def test_training_resumes_to_the_bit(granularity: str) -> None:
    def trainer() -> tuple[nn.Parameter, nn.Parameter, MultiTaskOptimizer]:
        generator = torch.Generator().manual_seed(0)
        one, two = (nn.Parameter(torch.randn(6, 3, generator=generator, dtype=torch.float64)) for _ in range(2))
        sgd = torch.optim.SGD([one, two], lr=0.05, momentum=0.5)
        return one, two, MultiTaskOptimizer(sgd, GradVac(seed=2), granularity=granularity)

    def train(one: Tensor, two: Tensor, opt: MultiTaskOptimizer, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            opt.backward(losses_of(one + two.sin(), step))
            opt.step()

    one, two, opt = trainer()
    train(one, two, opt, range(8))
    first, second, halfway = trainer()
    train(first, second, halfway, range(4))
    again, other, resumed = trainer()
    with torch.no_grad():
        again.copy_(first)
        other.copy_(second)
    resumed.load_state_dict(halfway.state_dict())
    train(again, other, resumed, range(4, 8))
    assert torch.equal(again, one) and torch.equal(other, two)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"beta": "0.5"}, TypeError, "beta as a number, found '0.5'"),
        ({"beta": 1.5}, ValueError, r"beta in \[0, 1\], found 1.5"),
        ({"target": 1.0}, ValueError, r"target in \[-1, 1\), found 1.0"),
        ({"target": float("nan")}, ValueError, "target"),
        ({"order": "shuffled"}, ValueError, "'random', 'fixed'"),
        ({"reduction": "max"}, ValueError, "'sum', 'mean'"),
        ({"seed": -1}, ValueError, "-1"),
    ],
)
def test_bad_options(options, error, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        GradVac(**options)
