"""capture="harvest": rows are the tensors that autograd made."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from mtl_optim import MultiTaskOptimizer, PCGrad
from optim.oracle import TwoHeads, flatten, pcgrad_fixed, rows_of

FIXED = PCGrad(order="fixed")


def wrap(model: nn.Module) -> MultiTaskOptimizer:
    return MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), FIXED)


def test_combination_is_written_into_the_first_row() -> None:
    model = TwoHeads(3)
    seen: list[list[int]] = [[] for _ in model.trunk.parameters()]
    for p, pointers in zip(model.trunk.parameters(), seen, strict=True):
        p.register_post_accumulate_grad_hook(lambda p, pointers=pointers: pointers.append(p.grad.data_ptr()))
    wrap(model).backward(model.losses())
    assert all(p.grad.data_ptr() == pointers[0] for p, pointers in zip(model.trunk.parameters(), seen, strict=True))
    assert all(len(pointers) == 3 for pointers in seen)


def test_gradients_that_share_memory() -> None:
    """Autograd gives both a view of one buffer; combined in place, one would overwrite the other."""

    def run(opt_of) -> list[Tensor]:  # type: ignore[no-untyped-def]
        a = nn.Parameter(torch.arange(4.0, dtype=torch.float64).reshape(2, 2))
        b = nn.Parameter(torch.ones(1, 4, dtype=torch.float64))
        target = torch.tensor([3.0, -2.0, 5.0, 1.0], dtype=torch.float64)
        total = a.view(4) + b.view(4)
        return opt_of([a, b], [(total - target).square().sum(), (total + 2 * target).square().sum()])

    def ours(params, losses):  # type: ignore[no-untyped-def]
        MultiTaskOptimizer(torch.optim.SGD(params, lr=0.1), FIXED).backward(losses)
        return [p.grad for p in params]

    def expected(params, losses):  # type: ignore[no-untyped-def]
        rows = torch.stack([flatten(row, params) for row in rows_of(losses, params)])
        return list(pcgrad_fixed(rows).split(4))

    for found, right in zip(run(ours), run(expected), strict=True):
        assert torch.allclose(found.reshape(-1), right)


def test_sparse_gradients_become_dense_with_one_warning() -> None:
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(5, 3, sparse=sparse, dtype=torch.float64)
        opt = MultiTaskOptimizer(torch.optim.SGD(embedding.parameters(), lr=0.1), FIXED)
        target = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        for step in range(2):
            out = embedding(torch.tensor([1, 3, 1]))
            losses = [(out - target).square().sum(), (out + target).square().sum()]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                opt.backward(losses)
            assert len(caught) == (1 if sparse and step == 0 else 0)
            assert not caught or "mtl=False" in str(caught[0].message)
            opt.step()
            opt.zero_grad()
        results.append(embedding.weight.detach())
    assert torch.allclose(*results)
