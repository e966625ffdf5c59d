"""Weights that do not depend on the gradients: `Sum`, `Mean` and `Constant`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl_kernels import Solution

from ..cuda_graphs import refuse_capture
from .base import About, Method, check_active, check_gram, spread
from .shares import equal_shares


@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Method):
    """w = 1: the gradient of the sum of the losses."""

    name: ClassVar[str] = "sum"
    about: ClassVar[About] = About("nothing", "none", "the gradient of the sum", "O(K)")
    needs_gram: ClassVar[bool] = False

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """Weight 1 on every active task; see `Method.solve`."""
        check_gram("Sum", gram)
        ones = torch.ones(gram.shape[-1], dtype=torch.float64, device=gram.device)
        return Solution(spread("Sum", gram, ones, active))


@dataclasses.dataclass(frozen=True, eq=False)
class Mean(Method):
    """w = 1 / K over the active tasks: the gradient of the mean of the losses."""

    name: ClassVar[str] = "mean"
    about: ClassVar[About] = About("nothing", "none", "the gradient of the mean", "O(K)")
    needs_gram: ClassVar[bool] = False

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """Weight 1 / (number of active tasks) on every active task; see `Method.solve`."""
        check_gram("Mean", gram)
        check_active("Mean", gram, active)
        return Solution(equal_shares(gram, active))


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Constant(Method):
    """w = the given weights: a strong baseline when tuned (Kurin et al. 2022, arXiv 2201.04122).

    A task that comes alone is weighted as well, but for parameters that a step of several tasks has shown to be its
    own, which a state dict tells of.

    Args:
        weights: finite weights >= 0 by the names of the tasks, ``Constant({"depth": 1.0, "normals": 0.01})``; or a
            sequence of K, for the tasks in the order in which they are first seen, which is safe where all come in
            every step. To climb a loss, negate the loss itself.

    Raises:
        TypeError, ValueError: no weights, or a weight that is not a finite number >= 0.
    """

    name: ClassVar[str] = "constant"
    about: ClassVar[About] = About("nothing", "none", "the gradient of a weighted sum", "O(K)")
    needs_gram: ClassVar[bool] = False

    weights_per_task: tuple[float, ...] | dict[str, float]
    _on_device: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _bound: dict[tuple[str, ...], Constant] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __init__(self, weights: Mapping[str, float] | Sequence[float] | Tensor) -> None:
        values = _as_weights(list(weights.values()) if isinstance(weights, Mapping) else weights)
        if isinstance(weights, Mapping) and not all(isinstance(name, str) for name in weights):
            raise TypeError(f"Constant: expected the names of tasks as strings, found {list(weights)}")
        kept = dict(zip(weights, values, strict=True)) if isinstance(weights, Mapping) else values
        object.__setattr__(self, "weights_per_task", kept)
        object.__setattr__(self, "state", {})
        object.__setattr__(self, "_on_device", {})
        object.__setattr__(self, "_bound", {})

    def __getstate__(self) -> dict[str, Any]:
        # Loaded with another map_location, a copy on a device would be found under the name of the old one.
        return {**self.__dict__, "_on_device": {}, "_bound": {}}

    @property
    def weighs_alone(self) -> bool:
        """True: the weight of a task holds whether or not others are there."""
        return True

    def bound_to(self, tasks: tuple[str, ...]) -> Constant:
        """The weights of these tasks, in their order; see `Method.bound_to`."""
        by_name = self.weights_per_task
        if not isinstance(by_name, dict):
            return self
        if tasks not in self._bound:
            if missing := [task for task in tasks if task not in by_name]:
                raise ValueError(
                    f"Constant has weights for {list(by_name)} and none for task {missing[0]!r}; add it, or name the "
                    "losses so: opt.backward({name: loss, ...})"
                )
            self._bound[tasks] = Constant([by_name[task] for task in tasks])
        return self._bound[tasks]

    def check_tasks(self, num_tasks: int) -> None:
        """Raise ValueError unless the weights are those of K tasks, in their order."""
        if isinstance(self.weights_per_task, dict):
            raise ValueError(
                f"Constant was given weights by the names {list(self.weights_per_task)}, which a Gram matrix does not "
                "tell; call .bound_to(tasks) with the names of its rows first"
            )
        if num_tasks != len(self.weights_per_task):
            raise ValueError(
                f"Constant has {len(self.weights_per_task)} weights for {num_tasks} tasks; pass one weight per task"
            )

    def solve(self, gram: Tensor, *, losses: Tensor | None = None, active: Tensor | None = None) -> Solution:
        """The given weights for every problem; see `Method.solve`.

        Raises:
            ValueError: the number of weights is not K, or they go by names.
        """
        check_gram("Constant", gram)
        self.check_tasks(gram.shape[-1])
        # Copied to a device once: a copy at every step would make the host wait.
        cache = self._on_device
        if gram.device not in cache:
            refuse_capture("the weights of Constant would be copied to the device")
            cache[gram.device] = torch.tensor(self.weights_per_task, dtype=torch.float64, device=gram.device)
        return Solution(spread("Constant", gram, cache[gram.device], active))


def _as_weights(weights: Sequence[float] | Tensor) -> tuple[float, ...]:
    values = weights.detach().tolist() if isinstance(weights, Tensor) else weights
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"Constant: expected a sequence of weights, one per task, found {type(weights).__name__}")
    if not values:
        raise ValueError("Constant: expected one weight per task, found none")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"Constant: expected numbers as weights, found {value!r}")
        if not math.isfinite(value) or value < 0:
            raise ValueError(
                f"Constant: expected finite weights >= 0, found {value!r}; to climb a loss, negate the loss itself"
            )
    return tuple(float(value) for value in values)
