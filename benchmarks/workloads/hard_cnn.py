"""Hard sharing: a convolutional trunk and linear heads, on two things in one image."""

from __future__ import annotations

from collections.abc import Sequence

from .data import images
from .parts import HardSharing, convolutions
from .tasks import Task
from .workload import Supervised


class Network(HardSharing):
    """Of images ``[N, 1, side, side]``."""

    def __init__(self, tasks: Sequence[Task], side: int, width: int = 8, features: int = 64) -> None:
        super().__init__(tasks, convolutions(side, width, features), features)


def digits(seed: int) -> Supervised:
    """Multi-MNIST of small digits: two digits and their sum."""
    tasks = (Task("top-left", "classes", 10), Task("bottom-right", "classes", 10), Task("sum", "classes", 19))
    workload = Supervised(tasks, images.digit_pairs(seed, tuple(t.name for t in tasks)), Network, seed, side=12)
    workload.learning_rate, workload.quick_steps = 2e-3, 160
    return workload


def fashion(seed: int) -> Supervised:
    """Multi-Fashion: two items."""
    tasks = (Task("top-left", "classes", 10), Task("bottom-right", "classes", 10))
    workload = Supervised(tasks, images.fashion_pairs(seed), Network, seed, side=36)
    workload.quick_steps = 40
    return workload
