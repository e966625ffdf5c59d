"""Combinations of loss values: modules from K losses to one scalar, without per-task gradients.

Those that are a sum of one term per task can also stand in front of a method, as ``transform=`` of a
`mtl_optim.MultiTaskOptimizer`.
"""

from __future__ import annotations

from .averaging import DynamicWeightAverage
from .base import LossAbout, LossCombination, SumOfTerms, WeightedLosses
from .famo import FAMO
from .fixed import (
    FixedWeights,
    GeometricMean,
    InverseCurrentLoss,
    InversePriorLoss,
    LogSum,
    entropy_prior,
    variance_prior,
)
from .gradnorm import GradNorm
from .progress import DynamicTaskPriority, InverseInitialLoss, LossBalancedTaskWeighting
from .scalarization import COSMOS, PBI, STCH
from .uncertainty import IMTLL, UncertaintyWeighting

__all__ = [
    "COSMOS",
    "FAMO",
    "IMTLL",
    "PBI",
    "STCH",
    "DynamicTaskPriority",
    "DynamicWeightAverage",
    "FixedWeights",
    "GeometricMean",
    "GradNorm",
    "InverseCurrentLoss",
    "InverseInitialLoss",
    "InversePriorLoss",
    "LogSum",
    "LossAbout",
    "LossBalancedTaskWeighting",
    "LossCombination",
    "SumOfTerms",
    "UncertaintyWeighting",
    "WeightedLosses",
    "available",
    "entropy_prior",
    "get",
    "variance_prior",
]

_BY_NAME = {
    cls.__name__.lower(): cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, LossCombination) and "about" in vars(cls)
}


def available() -> list[str]:
    """The names `get` knows, sorted: those of the classes in lower case."""
    return sorted(_BY_NAME)


def get(name: str) -> type[LossCombination]:
    """The class of a combination by name, for example ``get("logsum")`` is `LogSum`.

    Raises:
        ValueError: the name is unknown; the text lists the known ones.
    """
    found = _BY_NAME.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"unknown combination of losses {name!r}; choose one of {', '.join(available())}")
    return found
