"""A Gram matrix over some parameters: passes that end there, and one weighted pass for all others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.grads import Row
from ..capture.graph import reached_leaves
from ..methods import Method
from .parameters import Parameters


@dataclasses.dataclass(frozen=True, eq=False)
class Partial:
    """What the passes of a step end in.

    Attributes:
        rows: the parameters of the Gram matrix, with those of single tasks.
        places: where they stand among the managed ones.
        rest: the parameters that the weights are for afterwards. plain: the leaves that receive the plain sum.
    """

    rows: Parameters
    places: list[int]
    rest: list[Tensor]
    plain: list[Tensor]

    @classmethod
    def of(cls, losses: Sequence[Tensor], parameters: Parameters, keep_outside: bool) -> Partial | None:
        """None where the graph of the losses hides parameters, so that no pass can end early."""
        leaves, hides = reached_leaves(losses)
        if hides:
            return None
        places = [p for p, inside in enumerate(parameters.in_gram) if inside]
        managed, others = set(map(id, parameters.managed)), set(map(id, parameters.others))
        in_rows = {id(parameters.managed[p]) for p in places}
        rest = [leaf for leaf in leaves if id(leaf) in managed and id(leaf) not in in_rows]
        plain = [leaf for leaf in leaves if id(leaf) not in managed and (id(leaf) in others or not keep_outside)]
        rows = parameters.at(places, others=False)
        return cls(rows, places, rest, plain)

    def whole(self, row: Row, parameters: Parameters) -> Row:
        """A row over all managed parameters."""
        found: Row = [None] * len(parameters.managed)
        for p, grad in zip(self.places, row, strict=True):
            found[p] = grad
        return found


def check_partial(groups: Iterable[Mapping[str, Any]], method: Method) -> None:
    """Raise for a param group whose ``gram`` is not a bool, does not go with the method, or with ``mtl=False``."""
    for g, group in enumerate(groups):
        inside = group.get("gram", True)
        if not isinstance(inside, bool):
            raise TypeError(f"param group {g} has gram={inside!r}; expected True (in the Gram matrix) or False")
        if inside:
            continue
        if not group.get("mtl", True):
            raise ValueError(
                f"param group {g} has gram=False and mtl=False: a plain sum needs no weights; leave one out"
            )
        if not method.weighs_rows:
            raise ValueError(
                f"param group {g} has gram=False, but the combination of {type(method).__name__} is no weighted sum of "
                "the rows of the step, so that it needs all of them"
            )
        if method.num_batches > 1:
            raise ValueError(
                f"param group {g} has gram=False, which is for steps of one batch, and {type(method).__name__} takes "
                f"{method.num_batches}"
            )


def gram_groups(model: torch.nn.Module, first: torch.nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Param groups for an optimizer, with a Gram matrix over ``first`` and what comes after it in the model alone.

    ::

        optimizer = torch.optim.AdamW(gram_groups(model, model.layer4, weight_decay=0.05), lr=1e-3)
        opt = MultiTaskOptimizer(optimizer, PCGrad())

    Args:
        model: whose parameters are given to the optimizer, in the order of ``model.parameters()``, which has to be that
            of its forward pass.
        first: a module of it, the first whose parameters count.
        options: keys of both groups.

    Returns:
        The group of the parameters before ``first``, with ``gram=False``, and that of the others.

    Raises:
        ValueError: ``first`` is not in the model, has no parameters, or nothing comes before it.
    """
    params = list(model.parameters())
    wanted = set(map(id, first.parameters()))
    if all(first is not module for module in model.modules()) or not wanted:
        raise ValueError("gram_groups: expected a module of the model that has parameters as the first one that counts")
    begin = next(p for p, param in enumerate(params) if id(param) in wanted)
    if begin == 0:
        raise ValueError(
            "gram_groups: no parameter comes before this module, so that all count; give the optimizer them"
        )
    return [{"params": params[:begin], "gram": False, **options}, {"params": params[begin:], **options}]
