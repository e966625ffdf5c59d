"""What a workload is, and the one that most of them are: a network on labelled examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl_optim import ConflictMonitor

from .data.splits import Part, Splits

_CHUNK = 500
"""Examples that are evaluated at once."""


class Outputs(NamedTuple):
    """What a network returns.

    Attributes:
        tasks: the outputs by task.
        features: what the heads of all tasks read, where there is one such tensor.
        auxiliary: a loss that belongs to no task and is added to their combination as it is.
    """

    tasks: dict[str, Tensor]
    features: Tensor | None = None
    auxiliary: Tensor | None = None


class Objective(NamedTuple):
    """The losses of a batch by task, and what `Outputs` says of features and auxiliary losses."""

    losses: dict[str, Tensor]
    features: Tensor | None = None
    auxiliary: Tensor | None = None


class Scored(Protocol):
    """What is known of a task: how its metric is called, and whether more of it is better."""

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str: ...

    @property
    def higher(self) -> bool: ...


class Workload:
    """A problem with several losses. What it is at a step depends on the step, its seed and its parameters alone.

    Attributes:
        tasks: the K tasks, in the order of their losses.
        model: whose parameters are trained.
        source: what the data is.
        learning_rate, batch_size: for Adam. steps, quick_steps: of a training, and of a short one.
        single_task: whether a task can be trained without the others; where not, they are parts of one problem.
    """

    tasks: Sequence[Scored]
    model: nn.Module
    source: str
    learning_rate: float = 1e-3
    batch_size: int = 64
    steps: int = 2000
    quick_steps: int = 120
    single_task: ClassVar[bool] = True

    def batch(self, step: int) -> Any:
        """The batch of a step, from 0."""
        raise NotImplementedError

    def objective(self, batch: Any) -> Objective:
        """The losses of a batch, with their graph."""
        raise NotImplementedError

    def metrics(self, part: str = "test") -> dict[str, float]:
        """By task, on the part "test" or "valid"."""
        raise NotImplementedError

    def param_groups(self) -> list[dict[str, Any]]:
        """What the optimizer is made of."""
        return [{"params": list(self.model.parameters())}]

    def after_round(self, optimizer: Optimizer, monitor: ConflictMonitor | None) -> None:
        """Called between some steps: here a model may change.

        Args:
            monitor: what was seen since the last call; None where gradients are not combined by this library.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that training changes."""
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, before an optimizer is made."""
        self.model.load_state_dict(state["model"])


def seeded(make: type[nn.Module], seed: int, *arguments: Any, **options: Any) -> Any:
    """A module with an initialisation that depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*arguments, **options)


def drawn(number: int, size: int, seed: int, step: int) -> Tensor:
    """Which of ``number`` examples are the batch of a step: epochs are permutations, a short rest is left out."""
    size = min(size, number)
    epoch, place = divmod(step, number // size)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(number, generator=generator)[place * size : (place + 1) * size]


class Supervised(Workload):
    """A network that returns `Outputs` of inputs, on labelled examples.

    Args:
        network: the class of the model, called with the tasks and ``options``.
        seed: of the initialisation and of the batches.
    """

    def __init__(
        self, tasks: Sequence[Any], splits: Splits, network: type[nn.Module], seed: int, **options: Any
    ) -> None:
        self.tasks, self.splits, self.source = tasks, splits, splits.source
        self.model = seeded(network, seed, tasks, **options)
        self._seed = seed

    def batch(self, step: int) -> Part:
        return self.splits.train[drawn(len(self.splits.train), self.batch_size, self._seed, step)]

    def objective(self, batch: Part) -> Objective:
        found: Outputs = self.model(batch.inputs)
        losses = {task.name: task.loss(found.tasks[task.name], batch.labels[task.name]) for task in self.tasks}
        return Objective(losses, found.features, found.auxiliary)

    @torch.no_grad()
    def metrics(self, part: str = "test") -> dict[str, float]:
        examples = self.splits.part(part)
        self.model.eval()
        outputs: dict[str, list[Tensor]] = {task.name: [] for task in self.tasks}
        labels: dict[str, list[Tensor]] = {task.name: [] for task in self.tasks}
        for begin in range(0, len(examples), _CHUNK):
            chunk = examples[slice(begin, begin + _CHUNK)]
            found = self.model(chunk.inputs).tasks
            for task in self.tasks:
                outputs[task.name].append(found[task.name])
                labels[task.name].append(chunk.labels[task.name])
        self.model.train()
        return {
            task.name: task.score(torch.cat(outputs[task.name]), torch.cat(labels[task.name])) for task in self.tasks
        }
