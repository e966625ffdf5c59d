"""Combinations of loss values: modules from K losses to one scalar, without per-task gradients."""

from .averaging import DynamicWeightAverage
from .base import LossCombination, WeightedLosses
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
    "LossBalancedTaskWeighting",
    "LossCombination",
    "UncertaintyWeighting",
    "WeightedLosses",
    "entropy_prior",
    "variance_prior",
]
