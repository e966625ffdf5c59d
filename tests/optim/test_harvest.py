"""capture="harvest": rows are the tensors that autograd made."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn

from mtl_optim import Constant, MultiTaskOptimizer, PCGrad, Sum
from optim.oracle import TwoHeads, flatten, pcgrad_fixed, rows_of, uncombined

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


class Replayed(torch.autograd.Function):
    """Hands out the same memory at every pass, filled without a trace: as the replay of a CUDA graph does."""

    static: Tensor

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.detach() * 1

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        Replayed.static.data.copy_(grad)
        return Replayed.static.detach()


@pytest.fixture
def replayed() -> tuple[nn.Parameter, nn.Parameter]:
    """A parameter to send through `Replayed`, and one to use as it is."""
    Replayed.static = torch.empty(4)
    return nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))


def test_memory_that_the_next_pass_overwrites(replayed: tuple[nn.Parameter, nn.Parameter]) -> None:
    """As torch.cuda.make_graphed_callables hands it out."""
    w, v = replayed
    opt = MultiTaskOptimizer(torch.optim.SGD([w, v], lr=0.1), Sum())
    v.grad = torch.full((2,), 7.0)
    with pytest.raises(RuntimeError, match=r"parameter 0 of shape \[4\].*row of this step.*capture=\"arena\""):
        opt.backward([Replayed.apply(w).sum(), -3 * Replayed.apply(w).sum() + v.sum()])
    assert w.grad is None and v.grad.tolist() == [7, 7] and opt.tasks == () and opt.report is None
    opt.backward([v.sum(), v.sum() * 2])
    assert v.grad.tolist() == [10, 10]


@pytest.mark.parametrize("how", ["backward", "blocks"])
def test_rows_that_were_overwritten_are_dropped(replayed: tuple[nn.Parameter, nn.Parameter], how: str) -> None:
    w, v = replayed
    opt = MultiTaskOptimizer(torch.optim.SGD([w, v], lr=0.1), Sum())

    def capture(name: str, factor: float) -> None:
        if how == "backward":
            opt.backward({name: Replayed.apply(w).sum() * factor}, accumulate=True)
            return
        with opt.task(name):
            (Replayed.apply(w).sum() * factor).backward()

    capture("a", 1.0)
    with pytest.warns(UserWarning, match="rows of this step were dropped"), pytest.raises(RuntimeError, match="arena"):
        capture("b", -3.0)
    assert not opt._training.pending.rows and w.grad is None
    with opt.task("a"):
        v.sum().backward()
    w.grad = torch.ones(4)
    # The overwritten row is one of the failed call itself: what was captured before is whole.
    with pytest.raises(RuntimeError, match="arena"):
        opt.backward({"b": Replayed.apply(w).sum(), "c": Replayed.apply(w).sum()}, accumulate=True)
    assert list(opt._training.pending.rows) == ["a"] and w.grad.tolist() == [1] * 4


def test_gradients_of_an_earlier_step_that_are_overwritten(replayed: tuple[nn.Parameter, nn.Parameter]) -> None:
    w, v = replayed
    opt = MultiTaskOptimizer(torch.optim.SGD([w, v], lr=0.1), Sum())
    opt.backward([Replayed.apply(w).sum(), v.sum()])
    with pytest.raises(RuntimeError, match=r"parameter 0 .*an earlier step.*zero_grad.*arena"):
        opt.backward([Replayed.apply(w).sum() * 2, v.sum()])
    for factor in (2.0, 3.0):
        opt.zero_grad()
        opt.backward([Replayed.apply(w).sum() * factor, v.sum()])
        assert w.grad.tolist() == [factor] * 4


@pytest.mark.parametrize("how", ["backward", "blocks"])
def test_the_arena_takes_memory_that_is_overwritten(replayed: tuple[nn.Parameter, nn.Parameter], how: str) -> None:
    w, _ = replayed
    opt = MultiTaskOptimizer(torch.optim.SGD([w], lr=0.1), Sum(), capture="arena")
    for _ in range(2):  # micro-batches
        if how == "backward":
            z = Replayed.apply(w)
            opt.backward([z.sum(), -3 * z.sum()], accumulate=True)
        for name, factor in (("0", 1), ("1", -3)) if how == "blocks" else ():
            with opt.task(name, accumulate=True):
                (factor * Replayed.apply(w).sum()).backward()
    opt.combine()
    assert opt.report.gram.tolist() == [[16, -48], [-48, 144]] and w.grad.tolist() == [-4] * 4


def test_the_arena_takes_heads_that_a_second_pass_overwrites() -> None:
    """With refresh_every, the pass for the shared parameters runs through the heads once more."""

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(hidden, weight)
            return hidden * weight

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            hidden, weight = ctx.saved_tensors
            Replayed.static.data.copy_(grad * hidden)
            return grad * weight, Replayed.static.detach()

    Replayed.static = torch.empty(4)
    trunk, head = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opt = MultiTaskOptimizer(torch.optim.SGD([trunk, head], lr=0.1), Constant([2, 3]), capture="arena", refresh_every=3)
    for age in range(3):
        opt.zero_grad()
        hidden = trunk * 2
        opt.backward([Head.apply(hidden, head).sum(), hidden.sum()])
        assert opt.report.age == age
        assert head.grad.tolist() == [2] * 4 and trunk.grad.tolist() == [10] * 4


@pytest.mark.parametrize(
    ("where", "how"), [("mtl=False", "backward"), ("mtl=False", "blocks"), ("outside", "backward")]
)
@pytest.mark.filterwarnings("ignore:the losses reach 1 tensor:UserWarning")
@pytest.mark.usefixtures("each_capture")
def test_memory_shared_with_a_gradient_that_stays(where: str, how: str) -> None:
    """Autograd goes on adding to the other one's ``.grad``, and combine writes into the row."""
    a, b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, 2))
    groups = [{"params": [a]}, *([{"params": [b], "mtl": False}] if where == "mtl=False" else [])]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), Constant([1, 3]))
    for _ in range(2):
        opt.zero_grad()
        b.grad = None
        total = a.view(-1) + b.view(-1)
        losses = {"x": (total * torch.arange(6.0)).sum(), "y": (total * 10).sum()}
        if how == "backward":
            opt.backward(losses)
        else:
            for name, loss in losses.items():
                with opt.task(name):
                    loss.backward(retain_graph=True)
            opt.combine()
        assert opt.report.gram.tolist() == [[55, 150], [150, 600]]
        assert a.grad.flatten().tolist() == [30, 31, 32, 33, 34, 35]
        assert b.grad.flatten().tolist() == [10, 11, 12, 13, 14, 15]


def test_a_row_that_changes_after_its_capture_is_refused() -> None:
    """In blocks nothing tells which tensors outside the optimizer a loss reaches."""
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(3, 2))
    opt = MultiTaskOptimizer(torch.optim.SGD([a], lr=0.1), Sum())

    def capture(name: str, accumulate: bool = False) -> None:
        with opt.task(name, accumulate=accumulate):
            (a.view(-1) + b.view(-1)).square().sum().backward()

    capture("x")
    capture("y")
    text = r"row of task 'x' changed after it was captured.*parameter 0 of shape \[2, 3\].*capture=\"arena\""
    for refused in (opt.combine, opt.step, lambda: capture("x", accumulate=True)):
        with pytest.raises(RuntimeError, match=text):
            refused()
    assert uncombined([a]) == [None] and list(opt._training.pending.rows) == ["x", "y"]
    opt.zero_grad()
    b.requires_grad_(False)
    capture("x")
    capture("y")
    opt.combine()
    assert a.grad.tolist() == [[4, 4, 4], [4, 4, 4]]


def test_neighbours_in_one_buffer_are_no_change() -> None:
    """Gradients of a concatenation lie side by side in one buffer and count their changes together."""
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(1, 3))
    opt = MultiTaskOptimizer(torch.optim.SGD([a], lr=0.1), Sum())
    for name in ("x", "y"):
        with opt.task(name):
            torch.cat([a, b]).square().sum().backward()
    opt.combine()
    assert a.grad.tolist() == [[4, 4, 4], [4, 4, 4]] and b.grad.tolist() == [[4, 4, 4]]


def test_a_failed_pass_leaves_nothing_behind() -> None:
    """Where other rows are pending, the gradients of a call that failed are let go as well."""
    model = TwoHeads(3)
    opt = wrap(model)
    losses = model.losses()
    opt.backward({"0": losses[0]}, accumulate=True, retain_graph=True)
    seen: list[weakref.ref[Tensor]] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(weakref.ref(p.grad)))
    failing = losses[2] * 1
    failing.register_hook(lambda grad: (_ for _ in ()).throw(KeyError("mine")))
    with pytest.raises(KeyError):
        opt.backward({"1": losses[1], "2": failing}, accumulate=True, retain_graph=True)
    assert len(seen) == 6 and all(ref() is None for ref in seen)
    with pytest.raises(KeyError), opt.task("1"):
        losses[1].backward(retain_graph=True)
        raise KeyError("mine")
    assert len(seen) == 12 and all(ref() is None for ref in seen) and list(opt._training.pending.rows) == ["0"]
    opt.backward({"1": losses[1], "2": losses[2]})
    assert opt.report.tasks == ("0", "1", "2")
