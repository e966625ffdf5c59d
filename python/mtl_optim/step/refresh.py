"""What `refresh_every` keeps of a step so that later ones need a single backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.grads import same_tensors
from ..capture.graph import leaves_beside
from ..capture.passes import Pass, weighted_passes
from .combination import Combined
from .parameters import Parameters


@dataclasses.dataclass(frozen=True, eq=False)
class Reusable:
    """Weights to use again.

    Attributes:
        present: the tasks of the step.
        weights: float64, one per present task; 1 for a task that reached no shared parameter. All nan where
            the Gram matrix was not finite: its weights are for that step alone.
        owner: per managed parameter its only task, as an index into ``present``; None where several or none
            reach it.
        age: steps since the weights were computed.
        params: the managed parameters; None if the weights came from a state dict and were not used since.
    """

    present: tuple[str, ...]
    weights: Tensor
    owner: tuple[int | None, ...]
    age: int = 0
    params: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, combined: Combined, present: Sequence[str], managed: Sequence[Tensor]) -> Reusable | None:
        """What a step leaves behind, if it had weights; it had one problem over the whole model."""
        report = combined.report
        if report.weights is None:
            return None
        index = [report.tasks.index(name) for name in present]
        position = {k: i for i, k in enumerate(index)}
        weights = torch.where(report.mask, report.weights, 1.0)
        weights = torch.where(report.gram.isfinite().all(), weights, torch.nan)
        owner = tuple(None if k is None else position[k] for k in combined.owner)
        return cls(tuple(present), torch.stack([weights[k] for k in index]), owner, params=tuple(managed))

    def older(self, managed: Sequence[Tensor]) -> Reusable:
        """The same one step later."""
        return dataclasses.replace(self, age=self.age + 1, params=tuple(managed))

    def serves(self, named: Mapping[str, Tensor], managed: Sequence[Tensor], every: int) -> bool:
        """Whether a step of these losses may use the weights, of which every ``every``-th are new.

        A state dict tells of the parameters no more than their number. The host waits for the weights the first time.
        """
        same = len(self.owner) == len(managed) if self.params is None else same_tensors(self.params, managed)
        if self.age + 1 >= every or set(self.present) != set(named) or not same:
            return False
        return self.age > 0 or bool(self.weights.isfinite().all())

    def too_coarse(self, named: Mapping[str, Tensor]) -> torch.dtype | None:
        """The dtype of losses that would round the weights; the host waits for them the first time.

        Autograd casts the gradient that a backward pass starts from to the dtype of the loss.
        """
        narrow = {k: named[name].dtype for k, name in enumerate(self.present) if named[name].dtype.itemsize < 4}
        if self.age > 0 or not narrow:
            return None
        weights = self.weights[list(narrow)]
        rounded = torch.stack([self.weights[k].to(dtype).double() for k, dtype in narrow.items()])
        return None if torch.equal(rounded, weights) else next(iter(narrow.values()))

    def passes(
        self,
        named: Mapping[str, Tensor],
        parameters: Parameters,
        plain_heads: bool,
        keep_outside: bool,
    ) -> list[Pass] | None:
        """The backward passes that give every tensor what a step with these weights gives it.

        Shared parameters get the weighted sum. Single-task ones with ``plain_heads`` and leaves that are not
        managed get the plain sum, in a pass of its own that goes no further down the graph than it must;
        those outside the optimizer nothing with ``keep_outside``.

        Returns:
            None if the graph hides parameters, so that a pass for some of them may miss others.
        """
        losses = [named[name] for name in self.present]
        weighted_ids = {
            id(p) for p, k in zip(parameters.managed, self.owner, strict=True) if k is None or not plain_heads
        }
        inside = [*parameters.managed, *parameters.others]
        leaves, hides = leaves_beside(losses, inside)
        if hides:
            return None
        if keep_outside:
            known = set(map(id, inside))
            leaves = [leaf for leaf in leaves if id(leaf) in known]
        plain = [leaf for leaf in leaves if id(leaf) not in weighted_ids]
        weighted = [leaf for leaf in leaves if id(leaf) in weighted_ids]
        return weighted_passes(losses, list(self.weights), weighted if plain or keep_outside else None, plain)

    @property
    def has_heads(self) -> bool:
        """Whether there are parameters that a single task reaches."""
        return any(k is not None for k in self.owner)

    def whole_pass(self, named: Mapping[str, Tensor]) -> list[Pass]:
        """The backward pass that gives everything the weighted sum."""
        return weighted_passes([named[name] for name in self.present], list(self.weights), None, [])

    def state_dict(self) -> dict[str, Any]:
        """Plain values and a tensor."""
        fields = {"present": list(self.present), "weights": self.weights.clone()}
        return {**fields, "owner": list(self.owner), "age": self.age}

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any], device: torch.device) -> Reusable:
        """The inverse of `state_dict`."""
        weights = saved["weights"].to(device, copy=True)
        return cls(tuple(saved["present"]), weights, tuple(saved["owner"]), saved["age"])
