"""The rest of PyTorch: checkpointing, autocast, layouts, dtypes, tied and frozen parameters."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtl_kernels as mk
from mtl_optim import MGDA, MultiTaskOptimizer, PCGrad, Sum
from optim.oracle import TwoHeads, flatten, pcgrad_fixed, rows_of

FIXED = PCGrad(order="fixed")
pytestmark = pytest.mark.usefixtures("each_capture")


def wrap(model: nn.Module, method=FIXED, **options) -> MultiTaskOptimizer:  # type: ignore[no-untyped-def]
    return MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, **options)


def trunk_agrees(model: TwoHeads, losses: list[Tensor], tolerance: float = 1e-9) -> bool:
    params = list(model.trunk.parameters())
    matrix = torch.stack([flatten(row, params) for row in rows_of(losses, params)])
    found = flatten([p.grad for p in params], params)
    return bool((found - pcgrad_fixed(matrix)).norm() <= tolerance * found.norm())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    class Checkpointed(TwoHeads):
        wrapped = True

        def forward(self, x: Tensor) -> list[Tensor]:
            x = x.requires_grad_() if reentrant else x
            hidden = checkpoint(self.trunk, x, use_reentrant=reentrant) if self.wrapped else self.trunk(x)
            return [head(hidden) for head in self.heads]

    model = Checkpointed(3)
    opt = wrap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the input that has to require grad is no parameter
        opt.backward(model.losses())
    model.wrapped = False
    assert trunk_agrees(model, model.losses())
    assert model.heads[0].weight.grad is not None


def test_whole_model_checkpointed_reentrantly() -> None:
    """The graph shows no parameter at all; capture goes through backward(), so it does not matter."""
    model = TwoHeads()
    x = torch.ones(8, 4, dtype=torch.float64, requires_grad=True)
    first, second = checkpoint(lambda x: tuple(model(x)), x, use_reentrant=True)
    opt = wrap(model)
    opt.backward([first.square().mean(), (second - 1).square().mean()])
    assert opt.report.active.tolist() == [True, True]


def test_autocast() -> None:
    model = TwoHeads(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, again = model.losses(), model.losses()
    opt = wrap(model)
    opt.backward(losses)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert trunk_agrees(model, again, 1e-5)


def test_channels_last() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)

    def losses() -> list[Tensor]:
        out = net(x)
        return [(out - 1).square().sum(), (out + 1).square().sum(), out.sum()]

    params = list(net.parameters())
    matrix = torch.stack([flatten(row, params) for row in rows_of(losses(), params)])
    wrap(net).backward(losses())
    assert torch.allclose(flatten([p.grad for p in params], params), pcgrad_fixed(matrix))
    assert net.weight.grad.stride() == net.weight.stride()


def test_mixed_dtypes() -> None:
    a = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    b = nn.Parameter(torch.tensor([0.5, -1.0, 3.0]))
    opt = MultiTaskOptimizer(torch.optim.SGD([a, b], lr=0.1), FIXED)

    def losses() -> list[Tensor]:
        return [a.float().square().sum() + b.sum(), (a.float() - 4).square().sum() - b.square().sum()]

    matrix = torch.stack([flatten(row, [a, b]) for row in rows_of(losses(), [a, b])])
    opt.backward(losses())
    assert a.grad.dtype == torch.bfloat16 and b.grad.dtype == torch.float32
    expected = pcgrad_fixed(matrix)
    assert torch.allclose(a.grad.double(), expected[:2], rtol=2**-8)
    assert torch.allclose(b.grad.double(), expected[2:], rtol=1e-6)


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(7, 5)
            self.out = nn.Linear(5, 7, bias=False)
            self.out.weight = self.embed.weight
            self.double()

    model = Tied()
    params = list(model.parameters())

    def losses() -> list[Tensor]:
        logits = model.out(model.embed(torch.tensor([1, 4, 2])))
        return [logits.square().sum(), nn.functional.cross_entropy(logits, torch.tensor([0, 3, 6]))]

    assert len(params) == 1
    matrix = torch.stack([flatten(row, params) for row in rows_of(losses(), params)])
    wrap(model).backward(losses())
    assert torch.allclose(params[0].grad.reshape(-1), pcgrad_fixed(matrix))


def test_frozen_parameters_are_left_alone() -> None:
    model = TwoHeads()
    model.trunk[0].requires_grad_(False)
    model.trunk[0].weight.grad = torch.ones_like(model.trunk[0].weight)
    opt = wrap(model)
    opt.backward(model.losses())
    assert (model.trunk[0].weight.grad == 1).all() and model.trunk[0].bias.grad is None
    model.trunk[0].requires_grad_(True)
    opt.zero_grad()
    opt.backward(model.losses())
    assert model.trunk[0].bias.grad is not None


def test_batch_norm_and_dropout_run_once_per_step() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    opt = wrap(net, MGDA())
    out = net(torch.randn(8, 4))
    opt.backward([out.square().mean(), (out - 1).square().mean()])
    assert int(net[1].num_batches_tracked) == 1


def test_gradient_hooks_fire_for_every_row() -> None:
    model = TwoHeads()
    calls = []
    model.trunk[0].weight.register_hook(lambda g: (calls.append(1), 2 * g)[1])
    opt = wrap(model, Sum())
    expected = torch.autograd.grad(sum(model.losses()), model.trunk[0].weight)[0]
    calls.clear()
    opt.backward(model.losses())
    assert len(calls) == 2 and torch.allclose(model.trunk[0].weight.grad, expected)


def test_backend_choice_reaches_the_step() -> None:
    results = []
    for name in [name for name, reason in mk.available_backends().items() if reason is None]:
        model = TwoHeads(3)
        opt = wrap(model, PCGrad())
        with mk.use_backend(name):
            opt.backward(model.losses())
        results.append(flatten([p.grad for p in model.parameters()], list(model.parameters())))
    assert all(torch.allclose(results[0], other, rtol=1e-9) for other in results)
