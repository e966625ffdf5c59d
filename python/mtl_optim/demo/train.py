"""One training run through `MultiTaskOptimizer`, timed in its three parts."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mtl_kernels import cosines
from mtl_optim import Method, MultiTaskOptimizer
from mtl_optim.losses import SumOfTerms

from .data import Pairs
from .model import SharedTrunk
from .options import Options
from .tasks import TASKS

LEARNING_RATE = 4e-3
EVALUATIONS = 20
"""Points of a learning curve after its start."""
EVALUATION_BATCH = 500


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What one method did.

    Attributes:
        method: the instance that was used. label: what it is called in print.
        evaluated: the steps after which the accuracies were taken.
        accuracies: ``[len(evaluated), K]`` on the test images.
        cosines: ``[steps, K, K]`` between the task gradients of the shared parameters.
        conflicts: bool ``[steps]``, whether any pair of these gradients had a negative product.
        milliseconds: per part ("forward + backward", "combine", "step") one value per step.
        transform: what stood in front of the method.
    """

    method: Method
    label: str
    evaluated: list[int]
    accuracies: Tensor
    cosines: Tensor
    conflicts: Tensor
    milliseconds: dict[str, list[float]]
    transform: SumOfTerms | None = None

    def median(self, part: str) -> float:
        """The median time of a part, in milliseconds."""
        return statistics.median(self.milliseconds[part])


def train(
    method: Method,
    label: str,
    train_set: Pairs,
    test_set: Pairs,
    options: Options,
    advance: Callable[[Tensor | None], None],
    transform: SumOfTerms | None = None,
) -> Run:
    """Trains a new network; initialisation and batches depend on ``options.seed`` alone, not on the method.

    A method that goes by several batches takes as many of them in a step.
    ``label`` is what the method is called in print. ``advance`` is called after every step, with the test accuracies
    ``[K]`` where they were just measured.
    """
    model = _new_model(options.seed)
    learned = [] if transform is None else list(transform.parameters())
    adam = torch.optim.Adam([*model.parameters(), *learned], lr=LEARNING_RATE)
    optimizer = MultiTaskOptimizer(adam, method, tasks=list(TASKS), transform=transform)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    evaluate_at = {round(options.steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)} - {0}
    evaluated, accuracies = [0], [_accuracies(model, test_set)]
    grams: list[Tensor] = []
    conflicts: list[Tensor] = []
    times: dict[str, list[float]] = {"forward + backward": [], "combine": [], "step": []}

    for step in range(1, options.steps + 1):
        batches = [_batch(train_set, options.batch_size, generator) for _ in range(method.num_batches)]
        optimizer.zero_grad()
        start = perf_counter()
        for number, (images, labels) in enumerate(batches):
            optimizer.backward(_losses(model, images, labels), accumulate=True, batch=number)
        captured = perf_counter()
        optimizer.combine()
        combined = perf_counter()
        optimizer.step()
        stepped = perf_counter()
        schedule.step()
        parts = (captured - start, combined - captured, stepped - combined)
        for values, seconds in zip(times.values(), parts, strict=True):
            values.append(1e3 * seconds)
        if (report := optimizer.report) is None:
            raise RuntimeError("the optimizer has no report of the step it just took")
        grams.append(report.gram)
        conflicts.append(report.conflict_fraction > 0)
        measured = None
        if step in evaluate_at:
            measured = _accuracies(model, test_set)
            evaluated.append(step)
            accuracies.append(measured)
        advance(measured)

    measured_at = (evaluated, torch.stack(accuracies))
    return Run(method, label, *measured_at, cosines(torch.stack(grams)), torch.stack(conflicts), times, transform)


def time_one_backward(train_set: Pairs, options: Options, steps: int = 30) -> float:
    """Median milliseconds of a forward pass and one backward pass of the summed losses, in plain PyTorch."""
    model = _new_model(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    times = []
    for _ in range(steps):
        images, labels = _batch(train_set, options.batch_size, generator)
        model.zero_grad()
        start = perf_counter()
        torch.autograd.backward(sum(_losses(model, images, labels).values(), torch.zeros(())))
        times.append(1e3 * (perf_counter() - start))
    return statistics.median(times)


def _new_model(seed: int) -> SharedTrunk:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SharedTrunk(TASKS)


def _batch(pairs: Pairs, size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    index = torch.randint(len(pairs), (size,), generator=generator)
    return pairs.images[index], {task: labels[index] for task, labels in pairs.labels.items()}


def _losses(model: SharedTrunk, images: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: cross_entropy(logits, labels[task]) for task, logits in model(images).items()}


@torch.no_grad()
def _accuracies(model: SharedTrunk, pairs: Pairs) -> Tensor:
    """The share of correct answers of every task, ``[K]``."""
    correct = torch.zeros(len(TASKS), dtype=torch.int64)
    for begin in range(0, len(pairs), EVALUATION_BATCH):
        chunk = slice(begin, begin + EVALUATION_BATCH)
        logits = model(pairs.images[chunk])
        right = [logits[task].argmax(1) == pairs.labels[task][chunk] for task in TASKS]
        correct += torch.stack(right).sum(1)
    return correct.double() / len(pairs)
