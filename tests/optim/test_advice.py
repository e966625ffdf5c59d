"""What users are told once: what leads to a gradient they did not mean, and nothing where all is well."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from mtl_optim import MGDA, Constant, Mean, MultiTaskOptimizer, PCGrad, Sum
from mtl_optim.step.advice import Advice
from optim.oracle import TwoHeads

pytestmark = pytest.mark.usefixtures("each_capture")


def sgd(*params: Tensor) -> torch.optim.SGD:
    return torch.optim.SGD(list(params), lr=0.1)


@pytest.fixture
def quiet():  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Parameters that several tasks have parts of


def test_learned_log_variances_in_one_vector() -> None:
    model, log_variances = TwoHeads(), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = MultiTaskOptimizer(sgd(*model.parameters(), log_variances), PCGrad())

    def losses(which: Tensor) -> list[Tensor]:
        return [loss * (-s).exp() + s for loss, s in zip(model.losses(), which, strict=True)]

    with pytest.warns(UserWarning, match=r"parameter 8 \(shape \[2\]\): per-task scalars in one vector") as caught:
        opt.backward(losses(log_variances))
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.backward(losses(log_variances))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("cure", ["parameters", "group"])
def test_what_the_warning_advises(cure: str) -> None:
    """The trunk's weights are then those without the log-variances."""
    model, twin = TwoHeads(), TwoHeads()
    if cure == "parameters":
        variances: list[Tensor] = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2)]
        groups = [{"params": [*model.parameters(), *variances]}]
    else:
        vector = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        variances = list(vector)
        groups = [{"params": list(model.parameters())}, {"params": [vector], "mtl": False}]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), MGDA())
    opt.backward([loss * (-s).exp() + s for loss, s in zip(model.losses(), variances, strict=True)])
    plain = MultiTaskOptimizer(sgd(*twin.parameters()), MGDA())
    plain.backward(twin.losses())
    torch.testing.assert_close(opt.report.weights, plain.report.weights)


def one_layer_for_all(outputs: list[int], *, last: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Losses of tasks that have some outputs each of one layer, and its parameters."""
    torch.manual_seed(0)
    trunk, head = nn.Linear(4, 8), nn.Parameter(torch.randn(8, sum(outputs)) if last else torch.randn(sum(outputs), 8))
    hidden = trunk(torch.randn(16, 4)).tanh()
    parts = (hidden @ (head if last else head.T)).split(outputs, dim=1)
    return [(part - 1).square().mean() for part in parts], [*trunk.parameters(), head]


@pytest.mark.parametrize("outputs", [[1, 1], [1, 3, 2], [2] * 8])
@pytest.mark.parametrize("last", [False, True])
def test_one_layer_for_all_heads(outputs: list[int], last: bool) -> None:
    losses, params = one_layer_for_all(outputs, last=last)
    with pytest.warns(UserWarning, match="the tasks use different parts of parameter 2"):
        MultiTaskOptimizer(sgd(*params), PCGrad()).backward(losses)


@pytest.mark.usefixtures("quiet")
def test_layers_that_are_shared_are_not_mistaken() -> None:
    """Overlapping parts, an embedding of which a batch reaches few rows, a task without gradient."""
    losses, params = one_layer_for_all([2, 2])
    MultiTaskOptimizer(sgd(*params), PCGrad()).backward([losses[0] + 0.1 * losses[1], losses[1]])
    table = nn.Parameter(torch.randn(50, 3))
    opt = MultiTaskOptimizer(sgd(table), PCGrad())
    opt.backward([table[:5].square().sum(), table[20:30].square().sum()])
    dead = nn.Parameter(torch.randn(2, 3))
    MultiTaskOptimizer(sgd(dead), Mean()).backward([dead.square().sum(), (dead * 0).sum()])
    convolution = nn.Conv2d(2, 4, 3)
    image = convolution(torch.randn(2, 2, 5, 5))
    MultiTaskOptimizer(sgd(*convolution.parameters()), PCGrad()).backward([image.square().sum(), image.sum()])


# Tasks whose gradient is zero


def test_mgda_names_the_task_that_stops_it() -> None:
    model = TwoHeads(3)
    opt = MultiTaskOptimizer(sgd(*model.parameters()), MGDA())
    names = ("depth", "ignored", "edges")

    def losses() -> dict[str, Tensor]:
        return dict(zip(names, (model.losses()[0], model.losses()[1] * 0, model.losses()[2]), strict=True))

    with pytest.warns(UserWarning, match=r"gradient of task 'ignored' is zero.*zero_rows=\"skip\"") as caught:
        opt.backward(losses())
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(not p.grad.any() for p in model.trunk.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.backward(losses())


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("granularity", ["model", "group"])
@pytest.mark.parametrize("options", [{}, {"normalize": "l2"}, {"solver": "frank_wolfe"}])
def test_mgda_skips_zero_rows_if_asked_to(granularity: str, options: dict[str, str]) -> None:
    model, twin = TwoHeads(3), TwoHeads(3)
    opt = MultiTaskOptimizer(sgd(*model.parameters()), MGDA(zero_rows="skip", **options), granularity=granularity)
    first, second, third = model.losses()
    opt.backward({"a": first, "b": second * 0, "c": third})
    plain = MultiTaskOptimizer(sgd(*twin.parameters()), MGDA(**options), granularity=granularity)
    first, _, third = twin.losses()
    plain.backward({"a": first, "c": third})
    for p, q in zip(model.trunk.parameters(), twin.trunk.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert opt.report.weights.flatten()[1] == 0
    opt.zero_grad()
    opt.backward([loss * 0 for loss in model.losses()])
    assert all(not p.grad.any() for p in model.parameters())


def test_towers_that_share_nothing_have_no_zero_rows() -> None:
    model = TwoHeads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = MultiTaskOptimizer(sgd(*model.heads.parameters()), MGDA())
        for param in model.trunk.parameters():
            param.requires_grad_(False)
        opt.backward(model.losses())


@pytest.mark.usefixtures("quiet")
def test_other_methods_go_on_with_zero_rows() -> None:
    model = TwoHeads()
    for method in (PCGrad(), Mean(), Sum()):
        MultiTaskOptimizer(sgd(*model.parameters()), method).backward([model.losses()[0], model.losses()[1] * 0])


def test_skipping_nothing_changes_nothing() -> None:
    rows = torch.randn(4, 30, dtype=torch.float64)
    assert torch.equal(MGDA(zero_rows="skip")(rows), MGDA()(rows))
    gram = rows @ rows.T
    active = torch.tensor([True, False, True, True])
    assert torch.equal(MGDA(zero_rows="skip").weights(gram, active=active), MGDA().weights(gram, active=active))
    gram[0, 0] = torch.nan
    assert MGDA(zero_rows="skip").weights(gram).tolist() == [0.25] * 4


# One task alone


def test_a_summed_loss_is_noticed_at_once() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(sgd(*model.parameters()), PCGrad())
    with pytest.warns(UserWarning, match="only task '0' is present. Pass the losses one by one, not their sum"):
        opt.backward([sum(model.losses())])


def test_a_summed_loss_with_a_name_is_noticed_when_it_comes_again() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(sgd(*model.parameters()), PCGrad())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.backward({"all": sum(model.losses())})
    with opt.task("all"):
        sum(model.losses()).backward()
    with pytest.warns(UserWarning, match="only task 'all' is present"):
        opt.step()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("way", ["backward", "blocks", "fixed"])
def test_tasks_that_take_turns_are_normal(way: str) -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(sgd(*model.parameters()), PCGrad(), tasks=["a", "b"] if way == "fixed" else None)
    for name, loss in [("a", 0), ("a" if way == "fixed" else "b", 1), ("a", 0)]:
        opt.zero_grad()
        if way == "blocks":
            with opt.task(name):
                model.losses()[loss].backward()
        else:
            opt.backward({name: model.losses()[loss]})
        opt.step()


# Tensors outside the optimizer


@pytest.mark.usefixtures("quiet")
def test_coordinates_and_interpolates_are_no_parameters() -> None:
    """Physics-informed nets differentiate by coordinates, gradient penalties by interpolates."""
    model = TwoHeads()
    opt = MultiTaskOptimizer(sgd(*model.parameters()), PCGrad())
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    first, second = model(x)
    (slope,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    opt.backward([slope.square().mean(), second.square().mean()])


def test_forgotten_parameters_are() -> None:
    model, forgotten = TwoHeads(), nn.Parameter(torch.ones((), dtype=torch.float64))
    opt = MultiTaskOptimizer(sgd(*model.parameters()), PCGrad())
    with pytest.warns(UserWarning, match=r"reach 1 parameter\(s\) that are not in the optimizer.*outside=\"keep\""):
        opt.backward([loss * forgotten for loss in model.losses()])
    assert forgotten.grad is not None


def test_the_hint_for_a_freed_graph_mentions_carried_state() -> None:
    cell, hidden = nn.RNNCell(2, 3), torch.zeros(1, 3)
    opt = MultiTaskOptimizer(sgd(*cell.parameters()), Mean())
    for step in range(2):
        hidden = cell(torch.ones(1, 2), hidden)
        if step == 0:
            opt.backward([hidden.sum(), hidden.square().sum()])
            continue
        with pytest.raises(RuntimeError, match=r"carried from step to step \(hidden states.*detach\(\) it"):
            opt.backward([hidden.sum(), hidden.square().sum()])


# Constant weights, complex parameters, plain sums


def test_constant_weighs_a_task_that_comes_alone() -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(sgd(*model.parameters()), Constant([1.0, 0.01]), tasks=["a", "b"])
    opt.backward({"b": model.losses()[1]})
    expected = torch.autograd.grad(model.losses()[1], list(model.trunk.parameters()))
    for p, g in zip(model.trunk.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 0.01 * g)
    opt.zero_grad()
    opt.backward(dict(zip("ab", model.losses(), strict=True)))  # now the heads are known
    opt.zero_grad()
    opt.backward({"b": model.losses()[1]})
    head = torch.autograd.grad(model.losses()[1], list(model.heads[1].parameters()))
    for p, g, weight in [
        *zip(model.trunk.parameters(), expected, [0.01] * 4, strict=True),
        *zip(model.heads[1].parameters(), head, [1.0] * 2, strict=True),
    ]:
        torch.testing.assert_close(p.grad, weight * g)
    assert opt.report.active.tolist() == [False, True] and opt.report.weights.tolist() == [0, 0.01]


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_constant_by_name(order: str) -> None:
    model = TwoHeads()
    opt = MultiTaskOptimizer(sgd(*model.parameters()), Constant({"b": 0.5, "unused": 9.0, "a": 2.0}))
    named = dict(zip("ab", model.losses(), strict=True))
    opt.backward({name: named[name] for name in order})
    first, second = model.losses()
    expected = torch.autograd.grad(2 * first + 0.5 * second, list(model.trunk.parameters()))
    for p, g in zip(model.trunk.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"weights for \['b', 'unused', 'a'\] and none for task 'c'; add it"):
        opt.backward({"c": model.losses()[0], "a": model.losses()[1]})
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert opt.tasks == tuple(order)
    state = opt.state_dict()["mtl"]
    assert state["config"] == {"weights_per_task": {"b": 0.5, "unused": 9.0, "a": 2.0}}


def test_constant_by_name_knows_no_matrix() -> None:
    method = Constant({"a": 1.0, "b": 0.5})
    with pytest.raises(ValueError, match=r"by the names \['a', 'b'\].*bound_to"):
        method(torch.ones(2, 3))
    assert method.bound_to(("b", "a"))(torch.ones(2, 3)).tolist() == [1.5] * 3
    for wrong in ({}, {"a": -1.0}, {"a": "1"}, {1: 1.0}):
        with pytest.raises((TypeError, ValueError), match="Constant: expected"):
            Constant(wrong)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("method", [PCGrad(order="fixed"), MGDA(), Sum()], ids=repr)
def test_complex_parameters_are_pairs_of_reals(dtype: torch.dtype, method) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    value = torch.randn(3, 5, dtype=dtype)
    z, pairs = nn.Parameter(value.clone()), nn.Parameter(torch.view_as_real(value.clone()))
    real, twin = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def losses(z: Tensor, real: Tensor) -> list[Tensor]:
        return [((z - k).abs().square().sum(1) * real).sum() + (z * 1j**k).real.sum() for k in (1, -2)]

    opt = MultiTaskOptimizer(sgd(z, real), method)
    opt.backward(losses(z, real))
    plain = MultiTaskOptimizer(sgd(pairs, twin), method)
    plain.backward(losses(torch.view_as_complex(pairs), twin))
    assert z.grad.dtype == dtype
    torch.testing.assert_close(torch.view_as_real(z.grad), pairs.grad)
    torch.testing.assert_close(opt.report.gram, plain.report.gram)
    opt.step()
    plain.step()
    torch.testing.assert_close(torch.view_as_real(z.data), pairs.data)
    with pytest.raises(TypeError, match="view_as_real"):
        method(torch.ones(2, 3, dtype=dtype))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("why", ["frozen trunk", "detached probes", "no managed parameter"])
@pytest.mark.parametrize("way", ["backward", "blocks", "accumulate"])
def test_steps_without_managed_gradients_are_plain_sums(why: str, way: str) -> None:
    model, twin = TwoHeads(), TwoHeads()
    groups = [{"params": list(model.trunk.parameters())}, {"params": list(model.heads.parameters()), "mtl": False}]
    if why == "no managed parameter":
        groups[0]["mtl"] = False
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), PCGrad())
    plain = sgd(*twin.parameters())
    for m in (model, twin):
        if why == "frozen trunk":
            m.trunk.requires_grad_(False)

    def losses(m: TwoHeads, step: int) -> list[Tensor]:
        if why != "detached probes":
            return m.losses(step)
        hidden = m.trunk(torch.ones(2, 4, dtype=torch.float64) * step).detach()
        return [(head(hidden) - 1).square().mean() for head in m.heads]

    for step in range(3):
        opt.zero_grad()
        if way == "blocks":
            for k in range(2):
                with opt.task(str(k)):
                    losses(model, step)[k].backward()
        else:
            opt.backward(losses(model, step), accumulate=way == "accumulate")
        opt.step()
        plain.zero_grad()
        sum(losses(twin, step)).backward()
        plain.step()
        assert all(torch.allclose(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_loss_that_reaches_nothing_of_the_optimizer_is_still_refused() -> None:
    model, stray = TwoHeads(), nn.Parameter(torch.ones(()))
    groups = [{"params": list(model.trunk.parameters())}, {"params": list(model.heads.parameters()), "mtl": False}]
    opt = MultiTaskOptimizer(torch.optim.SGD(groups, lr=0.1), PCGrad())
    with pytest.raises(ValueError, match="loss 'b' reaches none of the parameters of the optimizer"):
        opt.backward({"a": model.losses()[0], "b": stray.square()})
    with pytest.raises(ValueError, match="loss 'b' reaches none"), opt.task("b"):
        stray.square().backward()


# Methods of users


class Doubled(Mean):  # type: ignore[misc]
    def solve(self, gram, **options):  # type: ignore[no-untyped-def]
        return 2 * super().solve(gram, **options).weights


class Wrong(Mean):  # type: ignore[misc]
    found: object = None

    def solve(self, gram, **options):  # type: ignore[no-untyped-def]
        return self.found


def test_a_solve_may_return_the_weights_alone() -> None:
    rows = torch.randn(3, 4)
    torch.testing.assert_close(Doubled()(rows), 2 * rows.mean(0))
    assert Doubled().weights(torch.eye(3)).tolist() == [2 / 3] * 3
    model = TwoHeads()
    opt = MultiTaskOptimizer(sgd(*model.parameters()), Doubled())
    opt.backward(model.losses())
    assert opt.report.weights.tolist() == [1, 1]
    for found, error in ((None, TypeError), ([1.0], TypeError), (torch.ones(2), ValueError)):
        method = Wrong()
        object.__setattr__(method, "found", found)
        with pytest.raises(error, match=r"Wrong.solve\(\) returned .*; expected"):
            method(rows)


def test_a_gpu_is_asked_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags of one look are read at a later step, when they have arrived."""

    class Event:
        arrived = False

        def record(self, stream: object) -> None:
            pass

        def query(self) -> bool:
            return Event.arrived

    class Gpu:
        type = "cuda"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))

    class Gram:
        device = Gpu()

        def diagonal(self, **dims: int) -> Tensor:
            return torch.tensor([1.0, 0.0])

    class Report:
        gram, mask, tasks = Gram(), torch.tensor([True, True]), ("a", "b")

    advice = Advice(set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            advice.zero_rows(Report())  # type: ignore[arg-type]
    Event.arrived = True
    with pytest.warns(UserWarning, match="task 'b' is zero"):
        advice.zero_rows(Report())  # type: ignore[arg-type]
