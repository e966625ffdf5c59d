"""Many binary attributes of an image: hard sharing with up to 40 heads, and CelebA where it is given."""

from __future__ import annotations

from collections.abc import Sequence

from .data import attributes, celeba
from .data.folders import find
from .parts import HardSharing, convolutions
from .tasks import Task
from .workload import Supervised


class Network(HardSharing):
    """Of images ``[N, channels, side, side]``."""

    def __init__(self, tasks: Sequence[Task], side: int, channels: int = 1, width: int = 8, features: int = 64) -> None:
        super().__init__(tasks, convolutions(side, width, features, channels), features)


def derived(seed: int, number: int = attributes.MOST) -> Supervised:
    """Attributes derived from images of one thing."""
    splits = attributes.load(seed, number)
    example = splits.train[slice(0, 1)]
    tasks = tuple(Task(name, "binary") for name in example.labels)
    workload = Supervised(tasks, splits, Network, seed, side=example.inputs.shape[-1])
    workload.batch_size, workload.quick_steps = 32, 30
    return workload


def faces(seed: int) -> Supervised:
    """CelebA's 40 attributes; the data has to be given."""
    splits = celeba.load(find("celeba"))
    tasks = tuple(Task(name, "binary") for name in splits.train[slice(0, 1)].labels)
    return Supervised(tasks, splits, Network, seed, side=celeba.SIDE, channels=3, width=32, features=256)
