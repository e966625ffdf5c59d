"""Dense tasks: an encoder and decoder that all share, and a head for every task; the multi-task attention network.

On scenes of digits, and on NYUv2 and Cityscapes where they are given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .data import images, rooms
from .data.folders import find
from .data.splits import Splits
from .tasks import Task
from .workload import Outputs, Supervised


def block(before: int, after: int) -> nn.Sequential:
    """A convolution with its normalization."""
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU())


class Trunk(nn.Module):
    """Images ``[N, channels, H, W]`` to features ``[N, width, H, W]``: to a quarter and back, adding what was there."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first, self.second = block(channels, width), block(width, 2 * width)
        self.middle = block(2 * width, 2 * width)
        self.third, self.last = block(2 * width, width), block(width, width)
        self.down = nn.MaxPool2d(2)

    def stages(self, images: Tensor) -> list[Tensor]:
        """What the last three blocks put out, at a quarter, half and all of the size."""
        first = self.first(images)
        second = self.second(self.down(first))
        middle = self.middle(self.down(second))
        third = self.third(interpolate(middle, size=second.shape[2:]) + second)
        return [middle, third, self.last(interpolate(third, size=first.shape[2:]) + first)]

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(images)[-1]


class Pixels(nn.Module):
    """A 1 x 1 convolution for every task."""

    def __init__(self, tasks: Sequence[Task], width: int) -> None:
        super().__init__()
        self.names = [task.name for task in tasks]
        self.layers = nn.ModuleList(nn.Conv2d(width, task.outputs, 1) for task in tasks)

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: layer(z) for name, layer, z in zip(self.names, self.layers, features, strict=True)}


class Network(nn.Module):
    """Hard sharing up to the last features."""

    def __init__(self, tasks: Sequence[Task], channels: int, width: int = 8) -> None:
        super().__init__()
        self.trunk, self.heads = Trunk(channels, width), Pixels(tasks, width)

    def forward(self, inputs: Tensor) -> Outputs:
        features = self.trunk(inputs)
        return Outputs(self.heads([features] * len(self.heads.layers)), features)


class Attention(nn.Module):
    """A task's masks over the shared features of every stage (Liu et al. 2019, arXiv 1803.10704, section 3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        shared, carried = (2 * width, width, width), (0, 2 * width, width)
        self.masks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(s + c, s, 1), nn.ReLU(), nn.Conv2d(s, s, 1), nn.Sigmoid())
            for s, c in zip(shared, carried, strict=True)
        )
        self.after = nn.ModuleList(block(s, s) for s in shared)

    def forward(self, stages: list[Tensor]) -> Tensor:
        state: Tensor | None = None
        for shared, mask, after in zip(stages, self.masks, self.after, strict=True):
            seen = shared if state is None else torch.cat((shared, interpolate(state, size=shared.shape[2:])), 1)
            state = after(mask(seen) * shared)
        if state is None:
            raise ValueError("expected stages, found none")
        return state


class AttentionNetwork(nn.Module):
    """A shared trunk, and for every task an attention over its stages."""

    def __init__(self, tasks: Sequence[Task], channels: int, width: int = 8) -> None:
        super().__init__()
        self.trunk, self.heads = Trunk(channels, width), Pixels(tasks, width)
        self.attention = nn.ModuleList(Attention(width) for _ in tasks)

    def forward(self, inputs: Tensor) -> Outputs:
        stages = self.trunk.stages(inputs)
        return Outputs(self.heads([own(stages) for own in self.attention]))


def dense(seed: int) -> Supervised:
    """Segments, depth and edges of scenes of digits."""
    return _digits(seed, Network)


def attention(seed: int) -> Supervised:
    """The same with attention."""
    return _digits(seed, AttentionNetwork)


def nyuv2(seed: int) -> Supervised:
    """Segments, depth and normals of rooms; the data has to be given."""
    return _given(seed, "nyuv2", (Task("depth", "depth"), Task("normals", "normals", 3)))


def cityscapes(seed: int) -> Supervised:
    """Segments and depth of streets; the data has to be given."""
    return _given(seed, "cityscapes", (Task("depth", "depth"),))


def _digits(seed: int, network: type[nn.Module]) -> Supervised:
    tasks = (Task("segments", "segments", 11), Task("depth", "depth"), Task("edges", "normals", 2))
    return _workload(seed, tasks, images.digit_scenes(seed), network, channels=1)


def _given(seed: int, name: str, others: tuple[Task, ...]) -> Supervised:
    tasks = (Task("segments", "segments", rooms.CLASSES[name]), *others)
    workload = _workload(seed, tasks, rooms.load(name, find(name)), AttentionNetwork, channels=3, width=32)
    workload.batch_size, workload.steps = 4, 20_000
    return workload


def _workload(seed: int, tasks: Sequence[Task], splits: Splits, network: type[nn.Module], **options: int) -> Supervised:
    workload = Supervised(tasks, splits, network, seed, **options)
    workload.learning_rate, workload.batch_size, workload.quick_steps = 2e-3, 32, 35
    return workload
