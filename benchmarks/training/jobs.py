"""What is run: which workload, with which method and seed, for how long."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from mtl_optim import Method, get_loss, get_method
from mtl_optim.catalog import loss_class
from mtl_optim.losses import SumOfTerms
from mtl_optim.methods import Constant, Sum

from ..provenance import slug

SINGLE, TUNED, PLAIN = "single", "tuned", "plain"
"""A network a task; the best of several fixed weights; the sum of the losses with one backward pass."""
_COMMA = r",(?=\w+=)"


@dataclasses.dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        method: a spec: ``mgda``, ``mgda:normalize=l2``, ``sum:transform=uw``; "single", "tuned" or "plain"; or a
        peer's,
            ``torchjd/mgda``.
        part: of "single" the task, of "tuned" the number of the drawn weights; else empty.
        rounds: how often it is evaluated.
    """

    workload: str
    method: str
    seed: int
    steps: int
    rounds: int
    part: str = ""

    @property
    def file(self) -> str:
        """The name of its files, without an ending."""
        text = f"{self.method} {self.part}".strip()
        return f"{self.workload}/{slug(text)}-{zlib.crc32(text.encode()) & 0xFFFF:04x}-{self.seed}"

    @property
    def ends(self) -> list[int]:
        """The steps after which a round ends."""
        return sorted({round(self.steps * (r + 1) / self.rounds) for r in range(self.rounds)} - {0})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method, and what stands in front of it."""

    method: Method
    transform: SumOfTerms | None = None


class UnfitError(ValueError):
    """A method that is not for so many tasks."""


def recipe(job: Job, tasks: Sequence[str]) -> Recipe:
    """What a job combines with, where it is this library that does.

    Raises:
        TypeError, ValueError: an unknown name, or options that the method does not take.
        UnfitError: the method is not for these tasks.
    """
    if job.method == TUNED:
        return Recipe(Constant(dict(zip(tasks, drawn_weights(job.seed, int(job.part), len(tasks)), strict=True))))
    name, options = parsed(job.method)
    if loss_class(name) is not None:
        return Recipe(Sum(), _transform(name, options, tasks))
    front = options.pop("transform", None)
    method: Method = get_method(name, **options)
    if "seed" in inspect.signature(type(method)).parameters and "seed" not in options:
        method = get_method(name, **options, seed=job.seed)
    try:
        method.bound_to(tuple(tasks)).check_tasks(len(tasks))
    except ValueError as error:
        raise UnfitError(str(error)) from error
    return Recipe(method, None if front is None else _transform(front, {}, tasks))


def _transform(name: str, options: dict[str, Any], tasks: Sequence[str]) -> SumOfTerms:
    cls = loss_class(name)
    if cls is not None and "tasks" in inspect.signature(cls).parameters:
        options = {"tasks": list(tasks)} | options
    found = get_loss(name, **options)
    if not isinstance(found, SumOfTerms):
        raise ValueError(f"{name}: {found.coupling()}")
    return found


def parsed(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of ``NAME:option=value,option=value``; a value is a Python literal, else text.

    Raises:
        ValueError: another form.
    """
    name, colon, text = spec.partition(":")
    options: dict[str, Any] = {}
    for part in re.split(_COMMA, text) if colon else ():
        option, equals, value = part.partition("=")
        if not equals or not value or not option.isidentifier():
            raise ValueError(f"expected NAME:option=value,option=value, found {spec!r}")
        try:
            options[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[option] = value
    return name, options


def drawn_weights(seed: int, number: int, num_tasks: int) -> list[float]:
    """Weights from 1/4 to 4, even in their logarithm, scaled to a mean of 1."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    weights = torch.exp2(4 * torch.rand(num_tasks, generator=generator, dtype=torch.float64) - 2)
    scaled: list[float] = (weights / weights.mean()).tolist()
    return scaled
