"""Losses that go through a transform before their passes: what the method combines, and what is refused."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_optim import MGDA, Constant, Method, MultiTaskOptimizer, PCGrad, Sum
from mtl_optim import losses as L
from optim.oracle import TwoHeads, rows_of
from optim.recording import record, warm_up

NAMES = ["a", "b", "c"]
MAKE: dict[str, Callable[[], L.SumOfTerms]] = {
    "fixed": lambda: L.FixedWeights({"a": 1.0, "b": 0.5, "c": 2.0}),
    "prior": lambda: L.InversePriorLoss([0.5, 2.0, 3.0]),
    "logsum": lambda: L.LogSum(),
    "current": lambda: L.InverseCurrentLoss(),
    "initial": lambda: L.InverseInitialLoss(NAMES),
    "lbtw": lambda: L.LossBalancedTaskWeighting(3),
    "dtp": lambda: L.DynamicTaskPriority(NAMES),
    "dwa": lambda: L.DynamicWeightAverage(NAMES),
    "uncertainty": lambda: L.UncertaintyWeighting(NAMES),
    "imtl-l": lambda: L.IMTLL(3),
    "famo": lambda: L.FAMO(3),
    "gradnorm": lambda: L.GradNorm(NAMES),
}


class Trainer:
    """Three tasks; the transform, if any, is the optimizer's or applied by hand to the losses."""

    def __init__(
        self, transform: Any, method: Method, by_hand: bool = False, model: TwoHeads | None = None, **options: Any
    ) -> None:
        self.model, self.transform, self.by_hand = model or TwoHeads(3), transform, by_hand
        learned = list(transform.parameters()) if isinstance(transform, nn.Module) else []
        if isinstance(transform, nn.Module):
            transform.double()
        groups = [{"params": list(self.model.parameters())}, {"params": learned, "lr": 0.05}]
        self.params = [param for group in groups for param in group["params"]]
        self.inner = torch.optim.SGD(groups, lr=0.1)
        self.opt = MultiTaskOptimizer(self.inner, method, transform=None if by_hand else transform, **options)

    def losses(self, seed: int) -> dict[str, Tensor]:
        return dict(zip(NAMES, self.model.losses(seed), strict=True))

    def backward(self, losses: dict[str, Tensor], **options: Any) -> None:
        self.opt.backward(self.transform.terms(losses) if self.by_hand else losses, **options)
        if self.by_hand and isinstance(self.transform, L.GradNorm) and not options:
            norms = dict(zip(NAMES, self.opt.report.norms, strict=True))
            self.transform.update({name: norms[name] for name in losses}, weighted=True)

    def step(self, seed: int) -> None:
        self.opt.zero_grad()
        self.backward(self.losses(seed))
        self.opt.step()

    def grads(self) -> list[Tensor | None]:
        return [None if param.grad is None else param.grad.clone() for param in self.params]


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("name", MAKE)
def test_terms_add_up_and_lead_to_their_own_loss(name: str) -> None:
    values = {"b": 2.0, "c": 0.5, "a": 3.0}
    leaves = {task: torch.tensor(value, dtype=torch.float64, requires_grad=True) for task, value in values.items()}
    module = MAKE[name]().double()
    if isinstance(module, L.DynamicTaskPriority):
        module.update({"c": 0.1, "a": 0.5, "b": 0.9})
    ordered = [leaves[task] for task in NAMES]
    value = copy.deepcopy(module)(ordered)
    listed = copy.deepcopy(module).terms(ordered)
    stacked = copy.deepcopy(module).terms(torch.stack(ordered))
    assert isinstance(listed, list) and isinstance(stacked, Tensor)
    torch.testing.assert_close(torch.stack(listed).sum(), value)
    torch.testing.assert_close(torch.stack(listed), stacked)
    for k, term in enumerate(listed):
        found = torch.autograd.grad(term, ordered, allow_unused=True, retain_graph=True)
        assert [grad is not None for grad in found] == [j == k for j in range(3)]
    if module.tasks is None and module.num_tasks is not None:
        with pytest.raises(ValueError, match="was built without the names of its tasks"):
            module.terms(leaves)
        return
    by_name = copy.deepcopy(module).terms(leaves)
    assert isinstance(by_name, dict) and set(by_name) == set(NAMES)
    torch.testing.assert_close(torch.stack([by_name[task] for task in NAMES]), stacked)
    torch.testing.assert_close(copy.deepcopy(module)(leaves), value)
    some = {task: leaves[task] for task in ("c", "a")}
    partial = copy.deepcopy(module).terms(some)
    assert set(partial) == {"a", "c"}
    torch.testing.assert_close(partial["c"], by_name["c"])
    torch.testing.assert_close(module(some), by_name["a"] + by_name["c"])


@pytest.mark.usefixtures("each_capture")
@pytest.mark.parametrize("name", MAKE)
def test_the_method_combines_the_gradients_of_the_terms(name: str) -> None:
    trainers = [Trainer(MAKE[name](), PCGrad(order="fixed"), by_hand) for by_hand in (False, True)]
    for seed in range(4):
        for trainer in trainers:
            if trainer.by_hand and trainer.transform.tasks is None and trainer.transform.num_tasks is not None:
                trainer.opt.zero_grad()
                trainer.opt.backward(dict(zip(NAMES, trainer.transform.terms(trainer.model.losses(seed)), strict=True)))
                trainer.opt.step()
            else:
                trainer.step(seed)
        assert same(*(trainer.grads() for trainer in trainers))
        assert torch.equal(trainers[0].opt.report.gram, trainers[1].opt.report.gram)
    expected = trainers[1].transform.state_dict()
    assert expected.keys() == trainers[0].transform.state_dict().keys()
    for key, value in trainers[0].transform.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0, equal_nan=True)


def logs_of_a_dict(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: losses[name].log() for name in reversed(losses)}


def logs_in_a_list(losses: dict[str, Tensor]) -> list[Tensor]:
    return [loss.log() for loss in losses.values()]


class Logs(nn.Module):
    def forward(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return logs_of_a_dict(losses)


@pytest.mark.parametrize("transform", [L.LogSum(), logs_of_a_dict, logs_in_a_list, Logs()])
def test_logs_before_mgda(transform: Any) -> None:
    model = TwoHeads(3)
    params = list(model.parameters())
    opt = MultiTaskOptimizer(torch.optim.SGD(params, lr=0.1), MGDA(), transform=transform)
    values = model.losses()
    rows = rows_of(values, params)
    scaled = [[None if g is None else g / v for g in row] for row, v in zip(rows, values, strict=True)]
    trunk = len(list(model.trunk.parameters()))
    matrix = torch.stack([torch.cat([g.reshape(-1) for g in row[:trunk]]) for row in scaled]).detach()
    opt.backward(dict(zip(NAMES, model.losses(), strict=True)))
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in params[:trunk]]), MGDA()(matrix))
    for p, param in enumerate(params[trunk:], trunk):
        torch.testing.assert_close(param.grad, next(row[p] for row in scaled if row[p] is not None))


def test_a_list_stays_a_list_in_the_order_of_the_losses() -> None:
    seen = []

    def halves(losses: list[Tensor]) -> tuple[Tensor, ...]:
        seen.append(losses)
        return tuple(loss / 2 for loss in losses)

    model = TwoHeads(2)
    names = ["1", "0"]  # the rows are in another order than the list
    opt = MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), Constant({"0": 1, "1": 10}), transform=halves, tasks=names
    )
    opt.backward(model.losses())
    assert isinstance(seen[0], list) and torch.equal(seen[0][0], model.losses()[0])
    expected = rows_of(model.losses(), [model.trunk[0].weight])
    torch.testing.assert_close(model.trunk[0].weight.grad, (expected[0][0] + 10 * expected[1][0]) / 2)


@pytest.mark.parametrize("head_scaling", ["none", "weights"])
def test_learned_numbers_are_heads(head_scaling: str) -> None:
    transform = L.UncertaintyWeighting(3)
    trainer = Trainer(transform, MGDA(), head_scaling=head_scaling)
    trainer.opt.backward(trainer.losses(0))
    weights = trainer.opt.report.weights
    assert (weights > 0).sum() > 1
    plain = L.UncertaintyWeighting(3).double()
    plain(trainer.model.losses(0)).backward()
    for k, (found, expected) in enumerate(zip(transform.s, plain.s, strict=True)):
        scale = 1 if head_scaling == "none" else weights[k]
        torch.testing.assert_close(found.grad, scale * expected.grad)
    halved = Trainer(None, MGDA())
    halved.opt.backward([loss / 2 for loss in halved.model.losses(0)])
    torch.testing.assert_close(trainer.opt.report.gram, halved.opt.report.gram)


def test_learned_numbers_outside_the_optimizer_are_told_of() -> None:
    model = TwoHeads(2)
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Sum(), transform=L.IMTLL(2).double())
    with pytest.warns(UserWarning, match=r"2 parameter\(s\) that are not in the optimizer"):
        opt.backward(model.losses())


def test_micro_batches() -> None:
    trainers = [Trainer(L.LogSum(), PCGrad(order="fixed"), by_hand) for by_hand in (False, True)]
    for trainer in trainers:
        trainer.backward(trainer.losses(0), accumulate=True)
        trainer.backward(trainer.losses(1))
    assert same(*(trainer.grads() for trainer in trainers))


@pytest.mark.parametrize("name", ["uncertainty", "current", "gradnorm"])
def test_reused_weights(name: str) -> None:
    trainers = [Trainer(MAKE[name](), MGDA(), by_hand, refresh_every=3) for by_hand in (False, True)]
    for seed in range(5):
        for trainer in trainers:
            trainer.opt.zero_grad()
            terms = trainer.transform.terms(trainer.losses(seed)) if trainer.by_hand else trainer.losses(seed)
            trainer.opt.backward(terms)
            if trainer.by_hand and name == "gradnorm" and trainer.opt.report.age == 0:
                trainer.transform.update(trainer.opt.report.norms, weighted=True)
            trainer.opt.step()
        assert trainers[0].opt.report.age == seed % 3
        assert same(*(trainer.grads() for trainer in trainers))


def test_methods_see_the_values_of_the_terms() -> None:
    transform = L.FixedWeights([2.0, 0.25, 1.0])
    trainer, plain = Trainer(transform, MGDA(normalize="loss")), Trainer(None, MGDA(normalize="loss"))
    trainer.opt.backward(trainer.losses(0))
    plain.opt.backward(transform.double().terms(plain.model.losses(0)))
    assert torch.equal(trainer.opt.report.weights, plain.opt.report.weights)


def norms_on(params: list[Tensor], losses: list[Tensor]) -> Tensor:
    return torch.stack([torch.cat([g.reshape(-1) for g in row]).norm() for row in rows_of(losses, params)]).detach()


def gradnorm_by_definition(w: Tensor, losses: Tensor, initial: Tensor, n: Tensor) -> Tensor:
    """One step of Algorithm 1, with the gradient of the objective by autograd."""
    ratio = losses / initial
    free = w.clone().requires_grad_()
    target = ((w * n).mean() * (ratio / ratio.mean()) ** 1.5).detach()
    (grad,) = torch.autograd.grad((free * n - target).abs().sum(), free)
    moved = (w - 0.025 * grad).clamp(min=1e-3)
    return moved * len(w) / moved.sum()


@pytest.mark.usefixtures("each_capture")
@pytest.mark.parametrize("granularity", ["model", "parameter"])
@pytest.mark.parametrize("standalone", [False, True])
def test_gradnorm_takes_the_norms_of_unweighted_gradients(granularity: str, standalone: bool) -> None:
    model = TwoHeads(3)
    shared = list(model.trunk.parameters())
    transform = L.GradNorm(3, parameters=shared if standalone else None)
    trainer = Trainer(transform, PCGrad(), granularity=granularity, model=model)
    counted = [0]
    model.trunk[0].weight.register_hook(lambda grad: counted.__setitem__(0, counted[0] + 1))
    w, initial = torch.ones(3, dtype=torch.float64), None
    for seed in range(6):
        values = model.losses(seed)
        n = norms_on(shared, values)
        now = torch.stack(values).detach()
        initial = now if initial is None else initial
        w = gradnorm_by_definition(w, now, initial, n)
        counted[0] = 0
        trainer.step(seed)
        assert counted[0] == (6 if standalone else 3)
        torch.testing.assert_close(transform.w, w, rtol=1e-9, atol=0)
    assert (w - 1).abs().max() > 0.01 and w.sum().item() == pytest.approx(3)


def test_gradnorm_with_an_absent_task() -> None:
    transform = L.GradNorm(NAMES)
    trainer = Trainer(transform, MGDA())
    trainer.step(0)
    before = transform.w.clone()
    losses = trainer.losses(1)
    n = norms_on(list(trainer.model.trunk.parameters()), list(trainer.model.losses(1)))
    pair = [0, 2]
    now, initial = torch.stack([losses[NAMES[k]] for k in pair]).detach(), transform.initial[pair]
    expected = gradnorm_by_definition(before[pair], now, initial, n[pair]) * before[pair].sum() / 2
    trainer.opt.zero_grad()
    trainer.opt.backward({"c": losses["c"], "a": losses["a"]})
    torch.testing.assert_close(transform.w[pair], expected, rtol=1e-9, atol=0)
    assert transform.w[1] == before[1] and not torch.equal(transform.w, before)


def test_gradnorm_stays_where_gradients_are_not_finite() -> None:
    transform = L.GradNorm(2)
    model = TwoHeads(2)
    opt = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), transform=transform.double())
    opt.backward(model.losses())
    before = transform.w.clone()
    opt.zero_grad()
    opt.backward([loss * factor for loss, factor in zip(model.losses(), (1.0, torch.inf), strict=True)])
    assert torch.equal(transform.w, before) and not torch.equal(before, torch.ones_like(before))
    opt.zero_grad()
    opt.backward(model.losses(1))
    assert not torch.equal(transform.w, before)


def test_blocks_are_transformed_by_hand() -> None:
    trainer, other = (Trainer(L.GradNorm(NAMES), MGDA(normalize="loss")) for _ in range(2))
    for seed in range(2):
        trainer.opt.zero_grad()
        for name, loss in trainer.losses(seed).items():
            with trainer.opt.task(name) as task:
                task.loss = trainer.opt.transform.terms({name: loss})[name]
                task.loss.backward(retain_graph=True)
        trainer.opt.step()
        other.opt.zero_grad()
        for name, loss in other.losses(seed).items():
            other.opt.backward({name: loss}, accumulate=True, retain_graph=True)
        other.opt.step()
        assert same(trainer.grads(), other.grads())
        assert torch.equal(trainer.opt.report.weights, other.opt.report.weights)
        assert torch.equal(trainer.transform.w, other.transform.w) and (trainer.transform.w != 1).all()
    untouched = Trainer(L.FixedWeights([5.0, 5.0, 5.0]), Sum())
    for name, loss in untouched.losses(0).items():
        with untouched.opt.task(name):
            loss.backward(retain_graph=True)
    untouched.opt.combine()
    plain = Trainer(None, Sum())
    plain.opt.backward(plain.losses(0))
    assert same(untouched.grads(), plain.grads())


@pytest.mark.parametrize("name", ["gradnorm", "uncertainty", "dwa", "famo"])
def test_a_resumed_run_goes_on_to_the_bit(name: str) -> None:
    first, second = (Trainer(MAKE[name](), PCGrad(seed=seed)) for seed in (1, 2))
    for seed in range(3):
        first.step(seed)
        if name == "dwa":
            first.transform.step()
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "opt": first.opt.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    second.model.load_state_dict(loaded["model"])
    with pytest.warns(UserWarning, match="options"):  # another seed
        second.opt.load_state_dict(loaded["opt"])
    saved = {key: value.clone() for key, value in loaded["opt"]["mtl"]["transform"]["state"].items()}
    for seed in range(3, 6):
        first.step(seed)
        second.step(seed)
        assert same(first.grads(), second.grads())
    assert any(not torch.equal(value, saved[key]) for key, value in first.transform.state_dict().items())
    for key, value in loaded["opt"]["mtl"]["transform"]["state"].items():
        torch.testing.assert_close(value, saved[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (None, "saved with transform None, this optimizer uses GradNorm"),
        (L.InverseInitialLoss(3), "saved with transform InverseInitialLoss, this optimizer uses GradNorm"),
        (L.GradNorm(2), "size mismatch"),
        (L.GradNorm(3), "number of parameter groups"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(saved: Any, text: str) -> None:
    trainer = Trainer(L.GradNorm(3), PCGrad())
    trainer.step(0)
    before, method = copy.deepcopy(trainer.transform.state_dict()), trainer.opt.method.state_dict()
    state = Trainer(saved, PCGrad(seed=0)).opt.state_dict()
    if text == "number of parameter groups":  # what is loaded last does not fit
        state["param_groups"].pop()
    with pytest.raises((ValueError, RuntimeError), match=text):
        trainer.opt.load_state_dict(state)
    for key, value in trainer.transform.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(trainer.opt.method.state_dict()["rng"], method["rng"])


def test_functions_and_modules_without_state_are_not_saved() -> None:
    for transform in (L.LogSum(), Logs(), logs_of_a_dict):
        trainer = Trainer(transform, PCGrad())
        trainer.step(0)
        state = trainer.opt.state_dict()
        assert state["mtl"]["transform"] is None
        Trainer(None, PCGrad()).opt.load_state_dict(state)


def test_copies_have_their_own() -> None:
    trainer = Trainer(L.GradNorm(3), PCGrad())
    trainer.step(0)
    twin = copy.deepcopy(trainer)
    twin.step(1)
    assert twin.opt.transform is twin.transform and not torch.equal(twin.transform.w, trainer.transform.w)


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (L.GeometricMean(), TypeError, "GeometricMean couples the losses: .* LogSum is one.*call backward.. on its value"),
    (L.STCH(2), TypeError, "STCH couples the losses"),
    (L.COSMOS([1, 1], 1), TypeError, "COSMOS couples"),
    (L.PBI([1, 1], 1), TypeError, "PBI couples"),
    (L.LogSum, TypeError, "an instance"),
    ("logsum", TypeError, "expected transform as an instance .* found 'logsum'"),
]


@pytest.mark.parametrize(("transform", "error", "text"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_cannot_stand_in_front_is_refused(transform: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Trainer(transform, Sum())


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (lambda losses: losses["a"], "returned a tensor of shape .* for 3 losses"),
        (lambda losses: [losses["a"]], "returned 1 losses for 3"),
        (lambda losses: None, "returned a NoneType for 3 losses"),
        (lambda losses: {"a": losses["a"]}, r"returned losses \['a'\] for .*; keep the names"),
        (lambda losses: [loss.detach() for loss in losses.values()], "no loss: loss 'a' does not require grad"),
        (lambda losses: [loss.expand(2) for loss in losses.values()], r"no loss: loss 'a' has shape \[2\]"),
        (lambda losses: [1.0, 2.0, 3.0], "no loss: loss 'a' is a float"),
        (L.FixedWeights([1.0, 2.0]), "expected 2 losses, found 3"),
        (L.UncertaintyWeighting(["a", "b", "x"]), "losses of task 'c'; expected those of .*'x'"),
    ],
)
def test_what_a_transform_may_not_return(transform: Any, text: str) -> None:
    trainer = Trainer(transform, MGDA())
    with pytest.raises((TypeError, ValueError), match=text):
        trainer.backward(trainer.losses(0))
    assert not trainer.opt._training.pending.rows and all(grad is None for grad in trainer.grads())


def test_a_module_without_names_needs_all_tasks() -> None:
    trainer = Trainer(L.IMTLL(3), MGDA())
    trainer.backward(trainer.losses(0))
    losses = trainer.losses(1)
    with pytest.raises(ValueError, match=r"IMTLL\(3\) was built without the names .* no loss of task 'b'"):
        trainer.backward({"a": losses["a"], "c": losses["c"]})
    with pytest.raises(ValueError, match="found no losses of task 'b'"):
        named = Trainer(L.FAMO(NAMES), MGDA())
        named.backward({name: named.losses(0)[name] for name in ("a", "c")})


def test_stacked_results_are_told_of() -> None:
    trainer = Trainer(lambda losses: torch.stack(list(losses.values())), MGDA())
    with pytest.warns(UserWarning, match="stacked into one tensor"):
        trainer.backward(trainer.losses(0))


def test_grad_scaler() -> None:
    for transform, scales in ((L.FixedWeights([1.0, 2.0, 3.0]), True), (L.LogSum(), False), (logs_of_a_dict, False)):
        trainer = Trainer(transform, PCGrad(order="fixed"))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        trainer.opt.backward({name: scaler.scale(loss) for name, loss in trainer.losses(0).items()})
        if scales:
            scaler.step(trainer.opt)
            plain = Trainer(L.FixedWeights([1.0, 2.0, 3.0]), PCGrad(order="fixed"))
            plain.backward(plain.losses(0))
            assert same(trainer.grads(), plain.grads())
        else:
            with pytest.raises(RuntimeError, match="sees losses that GradScaler has scaled"):
                scaler.step(trainer.opt)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["gradnorm", "uncertainty", "famo"])
def test_replays_equal_eager_steps(device: str, name: str) -> None:
    """A step with a transform holds nothing that a CUDA graph could not replay."""

    class OnDevice:
        def __init__(self) -> None:
            self.transform = MAKE[name]().to(device)
            generator = torch.Generator().manual_seed(0)
            shapes = [(4, 50), (50,), (50,), (50,)]
            self.params = [nn.Parameter(torch.randn(s, generator=generator).mul_(0.3).to(device)) for s in shapes]
            self.x = torch.zeros(8, 4, device=device)
            inner = torch.optim.SGD([*self.params, *self.transform.parameters()], lr=0.01)
            self.opt = MultiTaskOptimizer(inner, PCGrad(order="fixed"), transform=self.transform, capture="arena")

        def step(self) -> None:
            self.opt.zero_grad()
            hidden = torch.tanh((self.x.unsqueeze(-1) * self.params[0]).sum(1))
            outputs = [(hidden * head).sum(-1) for head in self.params[1:]]
            losses = [(out - (-1) ** k * 3).square().mean() for k, out in enumerate(outputs)]
            self.opt.backward(dict(zip(NAMES, losses, strict=True)))
            self.opt.step()

    ours, eager = OnDevice(), OnDevice()
    for trainer in (ours, eager):
        warm_up(device, trainer.step)
    with pytest.MonkeyPatch.context() as patch:
        # Values on a CPU are looked at before a logarithm; those on a device are not.
        patch.setattr(L.LossCombination, "require_positive", lambda *args, **options: None)
        replay = record(device, ours.step)
        eager.step()
        for seed in range(3):
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            for trainer, step in ((ours, replay), (eager, functools.partial(eager.step))):
                trainer.x.copy_(batch)
                step()
            for found, expected in zip(ours.params, eager.params, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
            for key, value in ours.transform.state_dict().items():
                expected = eager.transform.state_dict()[key]
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
