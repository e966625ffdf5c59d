"""Every workload trains through the one loop; what each shares is what its name says."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.training.jobs import Job, Recipe, recipe
from benchmarks.training.steppers import Combined, Plain, shared_of
from benchmarks.workloads import adaptive, physics, registry, soft_sharing
from benchmarks.workloads.data import fashion, images
from benchmarks.workloads.tasks import Task
from benchmarks.workloads.workload import Workload, drawn
from mtl_optim import Mean, PCGrad, SDMGrad, Sum

NOTHING_SHARED = ("soft",)


@pytest.fixture(scope="module", autouse=True)
def without_fashion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same on every machine: attributes are those of digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fashion.VARIABLE, str(tmp_path_factory.mktemp("empty")))
        yield


def small(name: str) -> Workload:
    workload = registry.build(name, 0)
    workload.batch_size = 8
    return workload


def weights(workload: Workload) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in workload.model.parameters()])


@pytest.mark.parametrize("name", registry.WORKLOADS)
def test_every_workload_takes_steps_through_the_optimizer(name: str) -> None:
    workload = small(name)
    stepper = Combined(workload, Recipe(PCGrad(seed=0)))
    before = weights(workload)
    monitor = stepper.monitor(2)
    for number in range(2):
        seconds = stepper.step(number)
    monitor.close()
    assert all(math.isfinite(value) and value >= 0 for value in seconds)
    assert bool((weights(workload) != before).any()) and bool(weights(workload).isfinite().all())
    report = stepper.optimizer.report
    assert report is not None and report.tasks == tuple(task.name for task in workload.tasks)
    assert bool((report.norms > 0).all()) == (name not in NOTHING_SHARED)
    workload.after_round(stepper.optimizer, monitor)
    stepper.step(2)  # with whatever the model has become
    for part in ("test", "valid"):
        found = workload.metrics(part)
        assert list(found) == [task.name for task in workload.tasks]
        assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("name", registry.WORKLOADS)
def test_batches_depend_on_the_step_and_the_seed(name: str) -> None:
    workload, again = small(name), small(name)
    torch.manual_seed(99)  # global random numbers play no part
    losses = [one.objective(one.batch(3)).losses for one in (workload, again)]
    other = workload.objective(workload.batch(4)).losses
    assert all(torch.equal(losses[0][task], losses[1][task]) for task in other)
    assert not all(torch.equal(losses[0][task], other[task]) for task in other)


def test_what_is_shared() -> None:
    counts = {}
    for name in ("digits", "soft", "cross-stitch", "physics", "relationship"):
        workload = small(name)
        shared, own, _ = shared_of(workload, workload.batch(0))
        counts[name] = len(shared), len(own)
    assert counts["digits"] == (8, 6)
    assert counts["soft"] == (0, 20)
    assert counts["cross-stitch"] == (12 + 4, 2 + 4)  # towers and two stitches; the last stitch and the heads
    assert counts["physics"] == (8, 0)
    assert counts["relationship"] == (4, 8)


def test_an_auxiliary_loss_is_added_to_the_combination_and_not_combined() -> None:
    workload = small("shared-private")
    shared, _, objective = shared_of(workload, workload.batch(0))
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in objective.losses.values()]
    assert objective.auxiliary is not None
    extra = torch.autograd.grad(objective.auxiliary, shared)
    stepper = Combined(workload, Recipe(Mean()))
    stepper.step(0)
    for param, *grads, added in zip(shared, *rows, extra, strict=True):
        expected = sum(grads) / len(rows) + added  # type: ignore[arg-type]
        torch.testing.assert_close(param.grad, expected, rtol=1e-4, atol=1e-7)


def test_the_tie_of_soft_sharing_by_hand() -> None:
    network = soft_sharing.Network((Task("a", "classes", 2), Task("b", "classes", 2)), side=12)
    with torch.no_grad():
        for tower, value in zip(network.towers, (1.0, 3.0), strict=True):
            for param in tower.parameters():
                param.fill_(value)
    number = sum(p.numel() for p in network.towers[0].parameters())
    assert float(network.tie().detach()) == 2 * number  # both are 1 from their mean


def test_the_tree_widens_from_its_last_layer_and_goes_on_from_a_state() -> None:
    workload = small("adaptive")
    assert isinstance(workload, adaptive.Adaptive)
    stepper = Combined(workload, Recipe(Sum()))
    blocks, parameters = [], []
    for number in range(3):
        monitor = stepper.monitor(1)
        before = workload.model(workload.batch(9).inputs).tasks
        stepper.step(number)
        monitor.close()
        after = workload.model(workload.batch(9).inputs).tasks
        workload.after_round(stepper.optimizer, monitor)
        split = workload.model(workload.batch(9).inputs).tasks
        assert all(torch.equal(split[task], after[task]) for task in split) and before.keys() == after.keys()
        blocks.append([len(layer) for layer in workload.model.blocks])
        parameters.append(sum(len(group["params"]) for group in stepper.optimizer.param_groups))
    assert [layer[0] for layer in blocks] == [1, 1, 1] and blocks[0][1] == 1
    assert 1 < blocks[0][2] <= adaptive.GROUPS[0] and 1 <= blocks[1][1] <= blocks[1][2]
    assert parameters[-1] == len(list(workload.model.parameters()))
    for groups in workload.model.groups:
        assert sorted(name for group in groups for name in group) == sorted(t.name for t in workload.tasks)
    again = small("adaptive")
    again.load_state_dict(workload.state_dict())
    assert torch.equal(weights(again), weights(workload))
    assert [len(g["params"]) for g in again.param_groups()] == [len(g["params"]) for g in workload.param_groups()]


def test_a_lower_layer_joins_what_is_above_it() -> None:
    branches = [["a"], ["b", "c"], ["d"]]
    assert list(map(sorted, adaptive.joined(branches, [["a", "b"], ["c", "d"]]))) == [["a", "b", "c", "d"]]
    assert sorted(map(sorted, adaptive.joined(branches, [["a", "d"], ["b", "c"]]))) == [["a", "d"], ["b", "c"]]


def test_the_prior_of_the_relationship_network_by_hand() -> None:
    workload = small("relationship")
    model = workload.model
    tensor = torch.stack(tuple(model.weights), -1).detach().double()  # type: ignore[arg-type]
    assert float(model.prior()) == pytest.approx(0.5 * float(tensor.square().sum()), rel=1e-5)  # type: ignore[operator]
    model.estimate()  # type: ignore[operator]
    sides = [getattr(model, f"side_{side}").double() for side in range(3)]
    whole = torch.kron(torch.kron(sides[0], sides[1]), sides[2])
    expected = 0.5 * float(tensor.flatten() @ whole @ tensor.flatten())
    assert float(model.prior()) == pytest.approx(expected, rel=1e-3)  # type: ignore[operator]


def test_the_heat_equation_has_its_solution() -> None:
    workload = physics.build(0)

    class Exact(torch.nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return physics.solution(points)

    workload.model = Exact()
    losses = workload.objective(workload.batch(0)).losses
    assert max(float(loss.detach()) for loss in losses.values()) < 1e-25
    assert losses["inside"].dtype == torch.float64


def test_a_method_of_several_batches_takes_them() -> None:
    workload = small("mixed")
    stepper = Combined(workload, Recipe(SDMGrad()))
    seen: list[int] = []
    batch = workload.batch
    workload.batch = lambda step: seen.append(step) or batch(step)  # type: ignore[func-returns-value, method-assign]
    stepper.step(0)
    stepper.step(1)
    assert seen == list(range(2 * SDMGrad().num_batches))


def test_a_plain_step_is_the_step_of_the_sum() -> None:
    plain, combined = small("sluice"), small("sluice")
    steps = (Plain(plain), Combined(combined, Recipe(Sum())))
    for number in range(3):
        for stepper in steps:
            stepper.step(number)
    torch.testing.assert_close(weights(plain), weights(combined), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "method", "steps"), [("mixed", "pcgrad", 60), ("mmoe", "mgda", 50)])
def test_training_learns(name: str, method: str, steps: int) -> None:
    workload = registry.build(name, 0)
    stepper = Combined(workload, recipe(Job(name, method, 0, steps, 1), [task.name for task in workload.tasks]))
    before = workload.metrics()
    for number in range(steps):
        stepper.step(number)
    after = workload.metrics()
    for task in workload.tasks:
        gain = (1 if task.higher else -1) * (after[task.name] - before[task.name])
        assert gain > 0.1 * before[task.name], task.name


def test_an_epoch_is_a_permutation() -> None:
    seen = torch.cat([drawn(10, 3, 0, step) for step in range(3)])
    assert len(set(seen.tolist())) == 9
    assert not torch.equal(drawn(10, 3, 0, 3), drawn(10, 3, 0, 0))
    assert torch.equal(drawn(10, 3, 1, 5), drawn(10, 3, 1, 5))


def test_scores_by_hand() -> None:
    segments = Task("s", "segments", 2)
    outputs = torch.tensor([[[[2.0, 0.0, 2.0, 2.0]], [[1.0, 1.0, 1.0, 1.0]]]])  # classes 0 1 0 0
    labels = torch.tensor([[[0, 1, 1, -1]]])
    assert segments.score(outputs, labels) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert Task("v", "value").score(torch.tensor([[1.0], [3.0]]), torch.tensor([2.0, 1.0])) == pytest.approx(2.5**0.5)
    assert Task("b", "binary").score(torch.tensor([[1.0], [-1.0]]), torch.tensor([1.0, 1.0])) == 0.5
    known = torch.tensor([[[[2.0, 0.0]]]])
    assert Task("d", "depth").score(torch.tensor([[[[3.0, 9.0]]]]), known) == 1.0
    normals = Task("n", "normals", 2)
    assert normals.score(torch.tensor([[[[0.0]], [[3.0]]]]), torch.tensor([[[[1.0]], [[0.0]]]])) == pytest.approx(90)


def test_scenes_show_what_their_pixels_say() -> None:
    scenes, pairs = images.digit_scenes(0), images.digit_pairs(0, ("top-left", "bottom-right"))
    train, both = scenes.train[slice(0, 50)], pairs.train[slice(0, 50)]
    for segments, image, first, second in zip(
        train.labels["segments"], train.inputs, both.labels["top-left"], both.labels["bottom-right"], strict=False
    ):
        assert set(segments.flatten().tolist()) <= {int(first), int(second), images.BACKGROUND}
        assert bool(((image[0] > 0.1) == (segments != images.BACKGROUND)).all())
    assert bool(
        (train.labels["depth"] >= 2 - train.inputs - 1e-6).all()
    )  # nothing of the digit is brighter than the image


def test_unknown_workloads_name_those_that_are_near() -> None:
    with pytest.raises(ValueError, match="did you mean digits"):
        registry.build("digit", 0)
    with pytest.raises(ValueError, match="unknown workload"):
        registry.build("attributes-41", 0)
    assert len(registry.build("attributes-5", 0).tasks) == 5
