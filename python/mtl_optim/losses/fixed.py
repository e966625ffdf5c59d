"""Weights that depend on no training history, and the two means through logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .base import LossAbout, LossCombination, SumOfTerms, WeightedLosses
from .checks import Vector, tasks_of, vector


class FixedWeights(WeightedLosses):
    """sum_k w_k L_k with given weights.

    Args:
        weights: K finite numbers, a sequence or a tensor ``[K]``; or a dict by the names of the tasks.

    Raises:
        TypeError, ValueError: no numbers, or some that are not finite.
    """

    about: ClassVar[LossAbout] = LossAbout("sum w L", "none", "none")
    scales_with_losses: ClassVar[bool] = True

    given: Tensor

    def __init__(self, weights: Vector) -> None:
        given = vector("FixedWeights", "weights", weights)
        super().__init__(tasks_of(weights))
        self.register_buffer("given", given)

    def weigh(self, losses: Tensor) -> Tensor:
        """The weights that were given, ``[K]``."""
        return self.given.clone()


class InversePriorLoss(WeightedLosses):
    """w_k = 1 / prior_k: each loss relative to what a constant predictor reaches.

    Args:
        prior: K finite numbers > 0, for example of `entropy_prior` and `variance_prior`; or a dict of them by the names
            of the tasks.

    Raises:
        TypeError, ValueError: no numbers, or some that are not finite and > 0.
    """

    about: ClassVar[LossAbout] = LossAbout("sum L / prior", "none", "none")
    scales_with_losses: ClassVar[bool] = True

    prior: Tensor

    def __init__(self, prior: Vector) -> None:
        values = vector("InversePriorLoss", "prior", prior)
        if not bool((values > 0).all()):
            raise ValueError(f"InversePriorLoss: expected priors > 0, found {values.tolist()}; leave such tasks out")
        super().__init__(tasks_of(prior))
        self.register_buffer("prior", values)

    def weigh(self, losses: Tensor) -> Tensor:
        """1 / prior_k, ``[K]``."""
        return 1 / self.prior


class InverseCurrentLoss(WeightedLosses):
    """w_k = 1 / sg(L_k): the value is K, the gradient that of sum_k log L_k.

    Losses <= 0 raise ValueError on a CPU; on other devices and in compiled code the weights become inf or negative.

    Args:
        tasks: how many tasks there are, or their names; None for any.

    Raises:
        TypeError, ValueError: ``tasks`` is none of these.
    """

    about: ClassVar[LossAbout] = LossAbout("sum L / sg(L)", "none", "none")

    def weigh(self, losses: Tensor) -> Tensor:
        """1 / L_k, ``[K]``."""
        self.require_positive(losses, "the inverse is the weight")
        return 1 / losses


class GeometricMean(LossCombination):
    """(prod_k L_k)^(1/K), as exp of the mean logarithm.

    Chennupati et al. 2019 (CVPR workshops, "MultiNet++"). Losses <= 0 raise ValueError on a CPU; on other
    devices and in compiled code nan or 0 flows.

    Args:
        tasks: how many tasks there are, or their names; None for any.

    Raises:
        TypeError, ValueError: ``tasks`` is none of these.
    """

    about: ClassVar[LossAbout] = LossAbout("(prod L)^(1/K)", "none", "none")
    instead: ClassVar[str] = "LogSum is one, and its gradient has the same direction"

    def combine(self, losses: Tensor) -> Tensor:
        """The definition."""
        self.require_positive(losses, "the logarithm is taken")
        return losses.log().mean().exp()


class LogSum(SumOfTerms):
    """sum_k log L_k, which does not change its gradient when a loss is scaled.

    Losses <= 0 raise ValueError on a CPU; on other devices and in compiled code nan or -inf flows.

    Args:
        tasks: how many tasks there are, or their names; None for any.

    Raises:
        TypeError, ValueError: ``tasks`` is none of these.
    """

    about: ClassVar[LossAbout] = LossAbout("sum log L", "none", "none")

    def factors(self, losses: Tensor) -> Tensor:
        """None are needed: the losses, checked."""
        self.require_positive(losses, "the logarithm is taken")
        return losses

    def term(self, losses: Tensor, factors: Tensor) -> Tensor:
        """log L_k."""
        return losses.log()


def entropy_prior(class_counts: Tensor | Sequence[float]) -> float:
    """The cross-entropy of a classifier that knows the class frequencies alone: their entropy, in nats.

    Args:
        class_counts: how often each class occurs, or its frequency; numbers >= 0, at least two of them > 0.

    Raises:
        TypeError, ValueError: no such numbers.
    """
    counts = vector("entropy_prior", "class_counts", class_counts).double()
    if bool((counts < 0).any()) or int((counts > 0).sum()) < 2:
        raise ValueError(
            f"entropy_prior: expected counts >= 0, at least two of them > 0; found {counts.tolist()}; a task with a "
            "single class has nothing to learn"
        )
    return float(torch.special.entr(counts / counts.sum()).sum())


def variance_prior(targets: Tensor) -> float:
    """The mean squared error of the best constant prediction: the variance of the targets, by n, not n - 1.

    Args:
        targets: real tensor ``[n, ...]``; each of the trailing entries has its own mean, and all of them one average.

    Raises:
        TypeError, ValueError: no real tensor, a variance of 0, or targets that are not finite.
    """
    if not isinstance(targets, Tensor) or targets.is_complex() or targets.dtype == torch.bool:
        found = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"variance_prior: expected targets as a tensor of real numbers, found {found}")
    if targets.dim() == 0 or targets.numel() == 0:
        raise ValueError(f"variance_prior: expected targets [n, ...], found shape {list(targets.shape)}")
    variance = float(targets.detach().double().var(dim=0, correction=0).mean())
    if not 0 < variance < float("inf"):
        raise ValueError(f"variance_prior: expected finite targets that vary, found a variance of {variance}")
    return variance
