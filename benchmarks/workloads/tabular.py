"""Hard sharing on tables: a perceptron with a classification and a regression head, and one with several values."""

from __future__ import annotations

from collections.abc import Sequence

from .data import qm9 as molecules
from .data import tables
from .data.folders import find
from .parts import HardSharing, perceptron
from .tasks import Task
from .workload import Supervised


class Network(HardSharing):
    """Of vectors ``[N, inputs]``."""

    def __init__(self, tasks: Sequence[Task], inputs: int, width: int = 64) -> None:
        super().__init__(tasks, perceptron(inputs, width, width), width)


def mixed(seed: int) -> Supervised:
    """A value and a class of a patient."""
    tasks = (Task("progression", "value"), Task("sex", "binary"))
    workload = Supervised(tasks, tables.diabetes(seed), Network, seed, inputs=9)
    workload.batch_size, workload.steps, workload.quick_steps = 32, 1000, 200
    return workload


def outputs(seed: int) -> Supervised:
    """Three values from three, of twenty men: a set to look at numbers with, not to compare methods on."""
    tasks = tuple(Task(name, "value") for name in ("weight", "waist", "pulse"))
    workload = Supervised(tasks, tables.linnerud(seed), Network, seed, inputs=3, width=16)
    workload.batch_size, workload.steps, workload.quick_steps = 12, 300, 100
    return workload


def qm9(seed: int) -> Supervised:
    """Eleven properties of molecules; the data has to be given."""
    splits = molecules.load(find("qm9"), seed)
    tasks = tuple(Task(name, "value") for name in molecules.TASKS)
    inputs = splits.train[slice(0, 1)].inputs.shape[1]
    return Supervised(tasks, splits, Network, seed, inputs=inputs, width=256)
