"""Inputs with the labels of every task, in three parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class DataMissingError(RuntimeError):
    """Data that is not on this machine; the message says what would bring it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Examples.

    Attributes:
        inputs: ``[N, ...]``. labels: for each task ``[N, ...]``.
    """

    inputs: Tensor
    labels: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Tensor | slice) -> Part:
        return Part(self.inputs[index], {task: values[index] for task, values in self.labels.items()})


class Examples(Protocol):
    """What a part of a data set can do; a `Part` that is in memory, or `Files`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor | slice) -> Part: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """Examples that are read when they are asked for.

    Attributes:
        number: of the examples. read: one by its number: its input, and its labels by task.
    """

    number: int
    read: Callable[[int], tuple[Tensor, dict[str, Tensor]]]

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: Tensor | slice) -> Part:
        chosen = range(self.number)[index] if isinstance(index, slice) else index.tolist()
        found = [self.read(place) for place in chosen]
        labels = {task: torch.stack([one[task] for _, one in found]) for task in found[0][1]} if found else {}
        return Part(torch.stack([inputs for inputs, _ in found]), labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """What is trained on, what fixed weights are tuned on, and what results are of.

    Attributes:
        source: what the data is and where it is from, for the tables.
    """

    train: Examples
    valid: Examples
    test: Examples
    source: str

    def part(self, name: str) -> Examples:
        """By its name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]


def split(part: Part, seed: int, source: str, share: float = 0.2) -> Splits:
    """A random split: ``share`` of the examples are for the test, as many for validation.

    Raises:
        ValueError: too few examples for three parts.
    """
    held = int(share * len(part))
    if held < 1 or len(part) <= 2 * held:
        raise ValueError(f"expected enough examples for three parts, found {len(part)} ({source})")
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
    return Splits(part[order[2 * held :]], part[order[held : 2 * held]], part[order[:held]], source)


def standardized(splits: Splits, tasks: tuple[str, ...] = ()) -> Splits:
    """Inputs, and the labels of ``tasks``, with the training part's mean 0 and standard deviation 1 in every column."""

    def scaled(values: Tensor, of: Tensor) -> Tensor:
        return (values - of.mean(0)) / of.std(0).clamp(min=1e-6)

    def part(one: Part) -> Part:
        labels = {t: scaled(v, splits.train.labels[t]) if t in tasks else v for t, v in one.labels.items()}
        return Part(scaled(one.inputs, splits.train.inputs), labels)

    return Splits(part(splits.train), part(splits.valid), part(splits.test), splits.source)
