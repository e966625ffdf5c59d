"""The demo: its data, its training runs, and the files it leaves."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
datasets = pytest.importorskip("sklearn.datasets")

import mtl_kernels  # noqa: E402
from mtl_optim import SDMGrad, Sum, cli, methods  # noqa: E402
from mtl_optim.demo import data, plots, specs, train  # noqa: E402
from mtl_optim.demo.model import SharedTrunk  # noqa: E402
from mtl_optim.demo.options import Options  # noqa: E402
from mtl_optim.losses import UncertaintyWeighting  # noqa: E402

STEPS = 4
SMALL = ["demo", "--steps", str(STEPS), "--batch-size", "8", "--threads", "1"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run with the default methods."""
    output = tmp_path_factory.mktemp("demo") / "deep" / "folder"
    arguments = [
        "demo",
        "--steps",
        str(STEPS),
        "--batch-size",
        "8",
        "--threads",
        "1",
        "--output",
        str(output),
    ]
    assert cli.main(arguments) == 0
    return output


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def pairs() -> tuple[data.Pairs, data.Pairs]:
    return data.load(3, num_train=600, num_test=200)


def test_images_and_labels(pairs: tuple[data.Pairs, data.Pairs]) -> None:
    _, digits = datasets.load_digits(return_X_y=True)
    for part, count in zip(pairs, (600, 200), strict=True):
        assert len(part) == count
        assert part.images.shape == (count, 1, data.CANVAS, data.CANVAS)
        assert part.images.dtype == torch.float32
        assert part.images.min() == 0 and part.images.max() == 1
        first, second = torch.from_numpy(digits)[part.sources].unbind(1)
        assert part.labels["top-left"].equal(first)
        assert part.labels["bottom-right"].equal(second)
        assert part.labels["digit-sum"].equal(first + second)
        for task, classes in data.TASKS.items():
            assert part.labels[task].dtype == torch.int64
            assert 0 <= part.labels[task].min() and part.labels[task].max() < classes


def test_no_digit_is_in_both_parts(pairs: tuple[data.Pairs, data.Pairs]) -> None:
    train_set, test_set = pairs
    assert not set(train_set.sources.flatten().tolist()) & set(test_set.sources.flatten().tolist())


def test_every_image_is_the_maximum_of_its_two_digits(pairs: tuple[data.Pairs, data.Pairs]) -> None:
    digits = torch.from_numpy(datasets.load_digits().images / 16).float()
    shifts = list(itertools.product(range(data.JITTER), repeat=2))
    last = data.CANVAS - data.DIGIT - data.JITTER + 1
    seen = set()
    for image, (first, second) in zip(pairs[0].images[:100, 0], pairs[0].sources[:100], strict=True):
        candidates = []
        for a, b in itertools.product(shifts, shifts):
            canvas = torch.zeros(2, data.CANVAS, data.CANVAS)
            canvas[0, a[0] : a[0] + 8, a[1] : a[1] + 8] = digits[first]
            canvas[1, last + b[0] : last + b[0] + 8, last + b[1] : last + b[1] + 8] = digits[second]
            if canvas.amax(0).equal(image):
                candidates.append((a, b))
        assert candidates
        seen.update(candidates)
    assert {a for a, _ in seen} == {b for _, b in seen} == set(shifts)


def test_data_follow_the_seed(pairs: tuple[data.Pairs, data.Pairs]) -> None:
    again, other = data.load(3, 600, 200), data.load(2**40, 600, 200)
    for part, same, different in zip(pairs, again, other, strict=True):
        assert part.images.equal(same.images)
        assert not part.images.equal(different.images)


def test_every_task_reaches_the_trunk_and_its_own_head_only() -> None:
    model = SharedTrunk(data.TASKS)
    logits = model(torch.rand(5, 1, data.CANVAS, data.CANVAS))
    assert {task: list(values.shape) for task, values in logits.items()} == {
        task: [5, classes] for task, classes in data.TASKS.items()
    }
    logits["top-left"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.trunk.parameters())
    assert model.heads["digit-sum"].weight.grad is None


def test_training_sum_is_training_on_the_summed_loss(pairs: tuple[data.Pairs, data.Pairs]) -> None:
    options = Options(steps=3, batch_size=16, seed=5)
    state = torch.get_rng_state()
    run = train.train(Sum(), "Sum", *pairs, options, lambda accuracies: None)
    assert state.equal(torch.get_rng_state())

    model = train._new_model(options.seed)
    adam = torch.optim.Adam(model.parameters(), lr=train.LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.steps):
        adam.zero_grad()
        losses = train._losses(model, *train._batch(pairs[0], options.batch_size, generator))
        torch.stack(list(losses.values())).sum().backward()
        adam.step()
        schedule.step()
    torch.testing.assert_close(train._accuracies(model, pairs[1]), run.accuracies[-1], atol=0.011, rtol=0)


def test_methods_of_several_batches_draw_as_many(pairs: tuple[data.Pairs, data.Pairs]) -> None:
    """What is shown of a step is of its last batch."""
    options = Options(steps=2, batch_size=16, seed=5)
    run = train.train(SDMGrad(), "SDMGrad", *pairs, options, lambda accuracies: None)
    assert run.accuracies.isfinite().all() and run.method.state["weights"].shape == (3,)

    model, generator = train._new_model(options.seed), torch.Generator().manual_seed(options.seed)
    for _ in range(3):
        images, labels = train._batch(pairs[0], options.batch_size, generator)
    rows = []
    for loss in train._losses(model, images, labels).values():
        grads = torch.autograd.grad(loss, list(model.trunk.parameters()), retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    torch.testing.assert_close(run.cosines[0], mtl_kernels.cosines(mtl_kernels.gram(torch.stack(rows))))


def test_conflicts_are_negative_cosines(pairs: tuple[data.Pairs, data.Pairs]) -> None:
    measured = []
    run = train.train(Sum(), "Sum", *pairs, Options(steps=12, batch_size=8), measured.append)
    assert len(measured) == 12
    assert run.cosines.shape == (12, 3, 3)
    assert run.conflicts.equal((run.cosines < 0).any(2).any(1))
    assert run.conflicts.any() and all(len(times) == 12 for times in run.milliseconds.values())


def test_the_run_leaves_numbers(small_run: Path) -> None:
    results = _results(small_run)
    assert (results["steps"], results["batch_size"], results["seed"], results["threads"]) == (STEPS, 8, 0, 1)
    assert list(results["methods"]) == ["Sum", "PCGrad", "MGDA"]
    start = {task: numbers[0] for task, numbers in results["methods"]["Sum"]["curve"].items()}
    for numbers in results["methods"].values():
        assert set(numbers["accuracy"]) == set(data.TASKS)
        assert all(0 <= accuracy <= 1 for accuracy in numbers["accuracy"].values())
        assert numbers["mean_accuracy"] == pytest.approx(np.mean(list(numbers["accuracy"].values())))
        assert 0 <= numbers["conflicting_steps"] <= 1
        assert numbers["curve"]["step"] == list(range(STEPS + 1))
        assert {task: values[0] for task, values in numbers["curve"].items()} == start
        for spread in numbers["ms"].values():
            assert 0 < spread["p20"] <= spread["median"] <= spread["p80"]


def test_the_run_leaves_a_picture(small_run: Path) -> None:
    from matplotlib.image import imread

    picture = imread(small_run / "demo.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.05


def test_table_options_and_repetition(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    output = tmp_path / "[red]"
    arguments = ["--methods", "pcgrad", "--backend", "auto", "--quiet", "--output", str(output)]
    assert cli.main(SMALL + arguments) == 0
    assert torch.get_num_threads() == threads
    text = capsys.readouterr().out
    for expected in ("Accuracy on 4000 test images after 4 steps", "PCGrad", "combine", "conflict", "[red]"):
        assert expected in text
    assert "━" not in text and "MGDA" not in text

    first, again = (_results(folder)["methods"]["PCGrad"] for folder in (small_run, output))
    assert first.pop("ms") and again.pop("ms")
    assert first == again


def test_seed_backend_and_progress(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--methods", "PCGrad", "--backend", "reference", "--seed", "1", "--output", str(tmp_path)]
    assert cli.main([*SMALL[:-2], *arguments]) == 0
    assert "━" in capsys.readouterr().out
    results = _results(tmp_path)
    assert results["backend"] == "reference"
    assert results["threads"] == max(1, min(4, torch.get_num_threads() - 1))
    assert results["methods"]["PCGrad"]["options"]["seed"] == 1
    assert results["methods"]["PCGrad"]["curve"] != _results(small_run)["methods"]["PCGrad"]["curve"]


def test_losses_train_as_a_plain_backward_pass_of_their_value(pairs: tuple[data.Pairs, data.Pairs]) -> None:
    options = Options(steps=4, batch_size=16, seed=5, methods=("uw",))
    method, transform = specs.build("uw", 0)
    run = train.train(method, "UW", *pairs, options, lambda accuracies: None, transform)

    model, plain = train._new_model(options.seed), UncertaintyWeighting(list(data.TASKS))
    adam = torch.optim.Adam([*model.parameters(), *plain.parameters()], lr=train.LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.steps):
        adam.zero_grad()
        plain(train._losses(model, *train._batch(pairs[0], options.batch_size, generator))).backward()
        adam.step()
        schedule.step()
    torch.testing.assert_close(train._accuracies(model, pairs[1]), run.accuracies[-1], atol=0.011, rtol=0)
    for found, expected in zip(run.transform.s, plain.s, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert all(value != 0 for value in run.transform.s)


@pytest.mark.parametrize(
    ("spec", "method", "transform", "name"),
    [
        ("mgda:normalize=l2", "MGDA(normalize='l2'", "None", "MGDA(normalize=l2)"),
        ("mgda:transform=logsum,tol=1e-9", "MGDA(", "LogSum([", "MGDA(transform=logsum, tol=1e-9)"),
        ("pcgrad:transform=gradnorm:alpha=0.5", "PCGrad(", "GradNorm([", "PCGrad(transform=gradnorm:alpha=0.5)"),
        ("GradNorm:alpha=2,lr=0.1", "Sum()", "GradNorm(['top-left'", "GradNorm(alpha=2, lr=0.1)"),
        ("fixed_weights:weights=[1,2,3]", "Sum()", "FixedWeights(3)", "FixedWeights(weights=[1,2,3])"),
        ("crmogm:method=mgda:normalize=l2", "CRMOGM(method=MGDA(normalize='l2'", "None", None),
    ],
)
def test_what_is_trained_with(spec: str, method: str, transform: str, name: str | None) -> None:
    recipe = specs.build(spec, 7)
    assert repr(recipe.method).startswith(method) and repr(recipe.transform).startswith(transform)
    assert name is None or specs.label(spec) == name


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("gls", "--methods gls: GeometricMean couples the losses"),
        ("famo", r"FAMO\(.*\) needs update\(losses\) after steps, which the demo does not call"),
        ("mgda:transform=dwa", "DynamicWeightAverage.* needs step"),
        ("mgda:transform=pcgrad", "'pcgrad' is a method"),
        ("mgda:transform=nothing", "unknown combination of losses 'nothing'"),
        ("fixedweights", "FixedWeights needs weights"),
        ("logsum:x=1", "LogSum has no option 'x'"),
        ("dcgd", "--methods dcgd: DCGD combines two tasks, found K = 3"),
        ("normalized:method=dcgd", "DCGD combines two tasks, found K = 3"),
        ("constant:weights=[1,2]", "Constant has 2 weights for 3 tasks"),
        ("constant:weights={'top-left':1}", "none for task 'bottom-right'"),
        ("graddrop:leak=[1,0]", "GradDrop has 2 leaks for 3 tasks"),
        ("trimmedmean:trim=2", "needs at least 2 trim"),
        ("nomethod", "--methods nomethod: unknown method"),
    ],
)
def test_what_the_demo_does_not_train_with(spec: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Options(methods=(spec,))


def test_methods_that_need_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have no weights to speak of, but Gram matrices like all others."""
    wanted = ["graddrop:leak=0.1", "trimmedmean:trim=1", "excessmtl:warmup=1", "moco", "dbmtl"]
    assert cli.main([*SMALL, "--methods", *wanted, "--quiet", "--output", str(tmp_path)]) == 0
    results = _results(tmp_path)["methods"]
    assert list(results) == ["GradDrop(leak=0.1)", "TrimmedMean(trim=1)", "ExcessMTL(warmup=1)", "MoCo", "DBMTL"]
    assert all(any(numbers["mean_cosine"].values()) for numbers in results.values())
    assert "MoCo" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 10])
def test_any_number_of_methods_can_be_drawn(tmp_path: Path, count: int) -> None:
    steps = 200
    run = train.Run(
        methods.get("sum")(), "Sum", [0, steps], torch.rand(2, 3), torch.rand(steps, 3, 3) - 0.5,
        torch.ones(steps, dtype=torch.bool), {"combine": [1.0] * steps},
    )  # fmt: skip
    plots.draw([run] * count, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
