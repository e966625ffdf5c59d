"""A call of `MultiTaskOptimizer.backward`, checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .parameters import Parameters


class Call(NamedTuple):
    """See the head of this file.

    Attributes:
        named: the losses, transformed. tasks: all that are known by now.
        names_given: whether the losses came with names.
    """

    named: dict[str, Tensor]
    tasks: tuple[str, ...]
    parameters: Parameters
    retain_graph: bool
    names_given: bool
